"""Plans a recipe: a line for each stage and row, the GPU hours, and the annotator's bill.

python -m extras.reproduce --recipe slf5k_8b --plan 8xH100-80

The assumptions of plan.py hold here, too. GPU hours count the GPUs that a command uses. An
annotator is assumed to answer at the first attempt.
"""

import contextlib
import io
import shlex

from extras.scale.plan import estimate, flags_that_fit, parse_machine, parse_stage, use_new_model
from extras.scale.stages import PROMPT, STAGES, prompt_length
from t2g.annotator import price
from t2g.server import Tokens

INSTRUCTIONS, LOG, ANSWER = 300, 500, 400  # tokens: annotator.QUESTION, a test log, an answer


def plan_recipe(machine_name, jobs, seeds) -> dict:
    """Prints and returns the plan of the jobs of one seed; seeds is how many there are."""
    available, machine = parse_machine(machine_name)
    print(f"{machine_name}, one seed; prompts without --max_prompt_length have {PROMPT} tokens")
    print(f"{'':48}{'GPUs':>6}{'GiB each':>10}{'hours':>8}{'GPU hours':>11}", flush=True)
    models, lines = {}, []
    for job in jobs:
        name = job.name
        for command in job.commands:
            with contextlib.redirect_stdout(io.StringIO()):  # of tasks that check the machine
                line = plan_command(command, job, models, available, machine)
            lines.append({"job": job.name, **line})
            sizes = f"{line['processes']:6}{line['gib']:10.1f}"
            times = f"{line['hours']:8.2f}{line['gpu_hours']:11.1f}" if machine[-1] else " " * 19
            bill = f", annotator {line['bill']:.2f}" if line["bill"] else ""
            print(
                f"{name:20}{line['script']:28}{sizes}{times}  {line['verdict']}{bill}", flush=True
            )
            name = ""
    totals = {name: sum(line[name] for line in lines) for name in ("gpu_hours", "bill")}
    for count in sorted({1, seeds}):
        hours = f"{count * totals['gpu_hours']:.0f} GPU hours, " if machine[-1] else ""
        print(f"seeds: {count}; {hours}annotator {count * totals['bill']:.2f}")
    return {"commands": lines, **totals}


def plan_command(command, job, models, available, machine) -> dict:
    """The plan of a command. Notes in models which model a job trains."""
    processes, script, words = split_command(command)
    line = dict(script=script, processes=processes, gib=0.0, hours=0.0, gpu_hours=0.0, bill=0.0)
    if script not in STAGES:
        return line | {"processes": 0, "verdict": "not planned: it needs no GPU"}
    task, args = parse_stage(script, words)
    use_models(script, args, task, job.folder, models)
    if hasattr(args, "gradient_accumulation_steps"):
        trained = args.policy if hasattr(args, "policy") else args.model
        models[str(job.folder / job.name)] = trained
    plan = estimate(args, processes, machine, script)
    hours = plan["hours"].get("all", 0.0)
    line |= dict(gib=plan["gib"], hours=hours, gpu_hours=processes * hours, verdict="fits")
    if script == "annotate.py":
        line["bill"] = bill_of(task, args)
    if processes > available:
        line["verdict"] = f"needs {processes} GPUs"
    elif not plan["fits"]:
        flags = flags_that_fit(args, processes, machine, script, available)
        line["verdict"] = f"fits with {' '.join(flags) or 'more or larger machines'}"
    return line


def split_command(line) -> tuple[int, str, list[str]]:
    """The processes, the script or module, and the flags of a command.

    >>> split_command("torchrun --nproc_per_node 8 -m extras.baselines.dpo --bf16")
    (8, 'extras.baselines.dpo', ['--bf16'])
    """
    words, processes = shlex.split(line), 1
    if words[0] == "torchrun":
        processes, words = int(words[words.index("--nproc_per_node") + 1]), words[3:]
    words = words[1:] if words[0] == "-m" else words
    return processes, words[0], words[1:]


def use_models(script, args, task, folder, models):
    """Replaces folders of earlier stages, which do not exist yet, by the models trained there."""
    beside = dict(policy="sft", model="sft", reward_model="rm")  # what is used if none is named
    for name in ["policy"] if script == "annotate.py" else beside:
        if hasattr(args, name):
            source = getattr(args, name) or str(folder / beside[name])
            setattr(args, name, models.get(source, getattr(args, name)))
    for name in ("runs", "models"):
        if hasattr(args, name):
            setattr(args, name, [models.get(run, run) for run in getattr(args, name)])
    use_new_model(task, args)


def bill_of(task, args) -> float:
    """The price of the annotator's tokens, by --input_price and --output_price."""
    read = prompt_length(args) + args.response_length + INSTRUCTIONS
    read += LOG if hasattr(task, "test_log") else 0
    return price(Tokens(args.num_samples * read, args.num_samples * ANSWER), args)
