"""A critic behind an OpenAI-compatible server: --critic openai --base_url URL --reward_model NAME.

Unless --free_critiques is given, requests carry a grammar, which vLLM supports; if the server
refuses it, they are sent without. It permits no EOS before the quotes, so that a model must begin
them by itself. Prompts are not shortened, because the server's tokenizer is unknown here, so its
context must hold prompt, response and critique.
"""

from t2g import server
from t2g.cli import fail
from t2g.critics import parse_or_none
from t2g.feedback import reward_prompt
from t2g.grammar import GRAMMAR, parse_cut
from t2g.log import print_once


def critic(task, args):
    options = dict(critique_length=args.critique_length, free=args.free_critiques)
    return openai_critic(args.base_url, args.reward_model, **options)


def openai_critic(base_url, model, critique_length=200, timeout=600.0, max_retries=5, free=False):
    """Returns a reward model behind a server as a critic.

    A critique that does not arrive is None; if none of a batch arrives, the program ends.
    """
    server.client(base_url, timeout, max_retries)  # fails now if the address or the key is wrong
    options = dict(model=model, max_tokens=critique_length, temperature=0)
    refused, read = free, parse_or_none if free else parse_cut

    async def ask(client, request):
        nonlocal refused
        if refused:
            return await server.ask(client, **request)
        grammar = {"structured_outputs": {"grammar": GRAMMAR}}
        try:
            return await server.ask(client, **request, extra_body=grammar)
        except server.Refused:
            answer = await server.ask(client, **request)  # fails if more than that is wrong
        print_once("the server takes no grammar, so critiques may be unreadable")
        refused = True
        return answer

    def critic(examples, responses):
        feedback, errors = [None] * len(responses), []
        client = server.client(base_url, timeout, max_retries)

        async def ask_one(i):
            content = reward_prompt(examples[i].prompt, responses[i])
            request = dict(messages=[{"role": "user", "content": content}], **options)
            try:
                answer = await ask(client, request)
                feedback[i] = read(answer.text)
            except server.NoAnswer as error:
                errors.append(error)

        try:
            server.ask_all(client, range(len(responses)), ask_one, concurrency=16)
        except server.Stop as error:
            fail(str(error))
        if len(errors) == len(responses):
            remedy = "; with vLLM see docs/SCALE.md, or try --free_critiques"
            fail(f"no critique arrived: {errors[-1]}; {server.CHECK}{remedy}")
        return feedback

    return critic
