"""What a stage keeps in memory, what each of its phases adds, and how long they take.

Figures are per process. Training stages shard their models over the processes; stages that only
sample hold a whole model in each process and share out the prompts. See plan.py.
"""

from extras.scale.passes import load_config, measure
from t2g import cpu

GIB = 2**30
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6  # shares that matrix products and decoding are assumed to reach
PROMPT, RESPONSE, CRITIQUE = 512, 128, 200  # tokens of each, where no flag gives them
QUESTION = 60  # tokens around the prompt and the response that a reward model reads
QUESTIONS = 1000  # of a benchmark, where no flag gives their number


class Stage:
    """Adds up bytes, seconds and FLOP. args: the flags; machine: a row of plan.GPUS."""

    def __init__(self, args, processes, machine):
        self.args, self.processes = args, processes
        _, bf16, fp32, bandwidth = machine
        self.on_cpu, self.bf16 = not bandwidth, getattr(args, "bf16", False)
        self.size = 2 if self.bf16 else 4  # bytes of a number in matrix products
        self.offload = getattr(args, "cpu_offload", False)
        self.sharded = processes > 1 or self.offload
        self.flops_a_second = (bf16 if self.bf16 else fp32) * 1e12 * OF_PEAK
        self.weights_a_second = bandwidth * 1e9 * OF_BANDWIDTH / self.size
        self.prompt = prompt_length(args)
        self.response = getattr(args, "response_length", None) or RESPONSE
        self.critique = getattr(args, "critique_length", CRITIQUE)
        self.judged = self.prompt + self.response + QUESTION  # tokens that a critic reads
        self.memory = {"process": 0.5 * GIB}  # CUDA's context, or Python and its libraries
        self.peak, self.seconds, self.flops, self.parameters = {}, {}, 0, 0

    def train(self, source, update, prompt, new, rows):
        """Keeps a model, its gradients and its optimiser. Returns its sizes and passes."""
        args = self.args
        keep_gradients = not self.sharded and args.gradient_accumulation_steps == 1
        options = (self.sharded, keep_gradients, self.on_cpu)
        model = measure(load_config(*source), args, update, (rows, prompt, new), *options)
        share = 0 if self.offload else 1 / self.processes
        self.memory["weights"], self.parameters = 4 * model.parameters * share, model.parameters
        self.memory["gradients"] = 0 if keep_gradients else 4 * model.trainable * share
        muon = getattr(args, "optimizer", "adamw") == "muon"  # one moment of blocks' matrices
        moments = model.trainable + (min(model.rest, model.trainable) if muon else model.trainable)
        self.memory["optimiser's moments"] = 4 * moments * share
        self.peak["update"] = model.update
        if self.sharded:  # two blocks and the rest are gathered; sums of gradients are in fp32
            self.peak["update"] += self.size * (2 * model.block + model.rest)
            if not args.lora_r:
                self.peak["update"] += (self.size + 4) * (model.block + model.rest)
        return model

    def freeze(self, name, model):
        """Keeps the weights of a model that is not trained."""
        replicated = self.sharded and getattr(self.args, "replicate_frozen", False)
        share = 0 if self.offload else 1 / self.processes
        self.memory[name] = (self.size if replicated else 4 * share) * model.parameters

    def critic(self):
        """Keeps the reward model of --critic rm, if there is one."""
        if self.args.critic != "rm":
            return None
        config = load_config(self.args.reward_model or self.args.policy, "--reward_model")
        shape = (1, self.judged, self.critique)
        model = measure(config, self.args, None, shape, self.sharded, on_cpu=self.on_cpu)
        self.freeze("reward model", model)
        return model

    def judge(self, critic, count, rows=64):
        if critic:
            replicated = getattr(self.args, "replicate_frozen", False)
            copied = not replicated and (self.sharded or self.bf16)
            texts = (self.judged, self.critique)
            self.sample("critique", critic, count, rows, *texts, copied=copied)

    def sample(self, phase, model, count, rows, prompt, new, copied=None):
        """Samples count texts, `rows` of them at a time."""
        rows = max(1, min(rows, count))
        self.make_room(phase, model, rows, prompt, new, copied)
        one = model.flops / model.length  # FLOP of a token
        self.flops += count * (prompt + new) * one
        if not self.on_cpu:
            token = rows * one / self.flops_a_second
            batch = prompt * token + new * max(model.parameters / self.weights_a_second, token)
            self.spend(phase, batch * count / rows)

    def make_room(self, phase, model, rows, prompt, new, copied=None):
        """The cache, the pass over the prompts, and, if copied, a whole copy of the weights.

        FSDP gathers them, autocast keeps them in bf16, and a CPU packs them.
        """
        packed = self.on_cpu and cpu.is_faster()
        copied = self.sharded or self.bf16 if copied is None else copied
        added = rows * model.cache * (prompt + new) * (4 if packed else self.size)
        added += rows * model.prefill * prompt / model.prompt
        added += self.size * model.parameters if copied or packed else 0
        self.peak[phase] = max(added, self.peak.get(phase, 0))

    def compute(self, phase, flops):
        self.flops += flops
        if not self.on_cpu:
            self.spend(phase, flops / self.flops_a_second)

    def spend(self, phase, seconds):
        self.seconds[phase] = self.seconds.get(phase, 0) + seconds


def prompt_length(args) -> int:
    return getattr(args, "max_prompt_length", None) or PROMPT


# ---- training ------------------------------------------------------------------------------------


def ppo(stage, args):
    texts = (stage.prompt, stage.response, args.per_device_train_batch_size)
    model = stage.train((args.policy, "--policy"), "ppo", *texts)
    if not args.lora_r:
        stage.freeze("reference", model)
    stage.peak["score"] = model.score
    if stage.sharded:
        gathered = 2 * model.block + model.rest * (1 if args.lora_r else 2)
        stage.peak["score"] += stage.size * gathered
    take_steps(stage, args, model)


def sdpo(stage, args):
    """Beside the policy stand a reference and a teacher."""
    texts = (stage.prompt, stage.response, args.per_device_train_batch_size)
    args.lora_r = getattr(args, "lora_r", None)
    model = stage.train((args.policy, "--policy"), "distillation", *texts)
    stage.freeze("reference", model)
    stage.freeze("teacher", model)
    take_steps(stage, args, model)


def take_steps(stage, args, model):
    """The rollouts, critiques, scores and updates of all steps."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    batch *= args.num_mini_batches
    count = batch * args.max_steps
    heldout = min(getattr(args, "eval_samples", 0), 64)  # evaluation samples 64 at a time
    texts = (stage.prompt, stage.response)
    stage.make_room("rollout", model, max(batch, heldout), *texts)
    stage.sample("rollout", model, count, batch, *texts)
    stage.judge(stage.critic(), count, min(batch, 64))
    # Policy and reference, and the policy again after the update
    stage.compute("score", 3 * count * model.flops)
    stage.compute("update", count * args.num_ppo_epochs * model.update_flops)


def supervised(stage, args, update="tokens", prompt=None, new=None):
    """Training texts have --max_length tokens, or those of their parts."""
    prompt, new = prompt or stage.prompt, new or stage.response
    if args.max_length:
        new = min(new, args.max_length - 1)
        prompt = args.max_length - new
    rows = args.per_device_train_batch_size * (2 if update == "pairs" else 1)
    flag = "model" if hasattr(args, "model") else "policy"
    model = stage.train((getattr(args, flag), f"--{flag}"), update, prompt, new, rows)
    count = rows * args.gradient_accumulation_steps * args.max_steps
    stage.compute("update", count * model.update_flops)
    return model


def reward_model(stage, args):
    supervised(stage, args, "tokens", stage.judged, stage.critique)


def scalar_reward_model(stage, args):
    supervised(stage, args, "value", stage.prompt + stage.response, 1)


def dpo(stage, args):
    """Samples and their critiques, the reference's log-probabilities, then training on pairs."""
    model = supervised(stage, args, "pairs")
    count = args.num_prompts * args.samples_per_prompt / stage.processes
    if not args.pairs:
        sample_before_training(stage, model, stage.critic(), count, stage.prompt)
    stage.compute("reference", 2 * args.num_prompts / stage.processes * model.flops)


def ilf(stage, args):
    """Samples and critiques, revisions and their critiques, then training on the revisions."""
    model, critic = supervised(stage, args), stage.critic()
    count = args.num_prompts * args.samples_per_prompt / stage.processes
    for prompt in (stage.prompt, stage.judged + stage.critique):
        sample_before_training(stage, model, critic, count, prompt)


def sample_before_training(stage, model, critic, count, prompt):
    """The policy is not sharded yet: each process holds all of its weights in fp32."""
    stage.memory["weights while sampling"] = 4 * model.parameters if stage.sharded else 0
    stage.sample("rollout", model, count, 64, prompt, stage.response, copied=stage.bf16)
    stage.judge(critic, count)


# ---- sampling ------------------------------------------------------------------------------------


def whole_model(stage, source, count, rows=64, prompt=None, new=None):
    """Samples count texts, of which this process takes its share, with weights of its own."""
    prompt, new = prompt or stage.prompt, new or stage.response
    config = load_config(source, "a model")
    model = measure(config, stage.args, None, (1, prompt, new), on_cpu=stage.on_cpu)
    stage.memory["weights"], stage.parameters = 4 * model.parameters, model.parameters
    share = count / stage.processes
    stage.sample("rollout", model, share, rows, prompt, new, copied=stage.bf16)


def annotate(stage, args):
    """The samples of the policy alone; the annotator is a program or a server."""
    if not args.responses:
        whole_model(stage, args.policy, args.num_samples, rows=128)


def evaluate(stage, args):
    """Responses, sampled and greedy, or critiques."""
    for run in args.runs or [args.policy]:
        if args.what == "policy":
            whole_model(stage, run, 2 * args.eval_samples)
        elif args.what == "rm":
            texts = dict(prompt=stage.judged, new=stage.critique)
            whole_model(stage, run, args.eval_samples, **texts)


def reflection(stage, args):
    """Responses, critiques and revisions, sampled and greedy."""
    args.policy, args.replicate_frozen = args.runs[0], True
    whole_model(stage, args.policy, 4 * args.eval_samples)
    stage.judge(stage.critic(), 2 * args.eval_samples / stage.processes)


def benchmark(stage, args):
    """A response of each model to each question."""
    sources = args.models if hasattr(args, "models") else [args.model]
    count = getattr(args, "num_problems", None) or getattr(args, "eval_samples", QUESTIONS)
    for source in sources:
        whole_model(stage, source, count * getattr(args, "num_samples", 1))


STAGES = {
    "train_ppo.py": ppo, "train_sft.py": supervised, "train_rm.py": reward_model,
    "annotate.py": annotate, "eval.py": evaluate, "extras.baselines.dpo": dpo,
    "extras.baselines.ilf": ilf, "extras.baselines.sdpo": sdpo,
    "extras.baselines.scalar_rm": scalar_reward_model, "extras.baselines.reflection": reflection,
    "extras.benchmarks.text": benchmark, "extras.benchmarks.code": benchmark,
    "extras.benchmarks.arc": benchmark, "extras.benchmarks.answers": benchmark,
}  # fmt: skip
