"""Two nodes make the run of two processes on one: network namespaces with a cable between them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forking import TORCHRUN, python

import train_ppo

FLAGS = (
    "--critic rule --max_steps 2 --num_ppo_epochs 2 --num_mini_batches 1 --response_length 12 "
    "--per_device_train_batch_size 2 --eval_samples 2 --learning_rate 3e-4"
).split()
NODES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}  # their names are those of the namespaces


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path):
    """Makes the nodes; returns a file that names them, as a cluster's name server would."""
    missing = [tool for tool in ("ip", "unshare", "mount", "hostname") if not shutil.which(tool)]
    if missing or os.geteuid():
        pytest.skip(f"two nodes need root and iproute2 and util-linux; missing: {missing}")
    try:
        for node in NODES:
            ip("netns", "add", node)
        ip(*"link add cable netns node-a type veth peer cable netns node-b".split())
        for node, address in NODES.items():
            ip("-n", node, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", node, "link", "set", device, "up")
        lines = [f"{address} {node}\n" for node, address in NODES.items()]
        (tmp_path / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        yield tmp_path / "hosts"
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "delete", node], capture_output=True)


def test_the_examples_for_clusters_have_arguments_of_the_script(monkeypatch):
    page = Path("docs/SCALE.md").read_text()
    slurm = page.split("    train_ppo.py ")[1].split("\n```")[0].split()
    kubernetes = Path("examples/kubernetes.yaml").read_text().split("- train_ppo.py\n")[1]
    flags = re.findall(r"^ +- (--\S+)=(\S+)$|^ +- (--bf16)$", kubernetes, re.M)
    pairs = [[word for word in flag if word] for flag in flags]
    outputs = []
    for words in (slurm, [word for pair in pairs for word in pair]):
        monkeypatch.setattr(sys, "argv", ["train_ppo.py", *words])
        _, args = train_ppo.parse_args()
        own = {"output_dir": Path(args.output_dir).name, "data": "train.jsonl"}
        outputs.append(vars(args) | own)
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_two_nodes_make_the_run_of_one(hosts, folder, tmp_path):
    flags = ["train_ppo.py", *FLAGS, "--policy", folder / "model", "--output_dir"]
    enter = f'hostname "$0"; mount --bind {hosts} /etc/hosts; exec "$@"'
    launch = [sys.executable, *TORCHRUN[:2], "--nnodes", "2", "--nproc_per_node", "1"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "node-a:29500"]
    launch += [*flags, tmp_path / "two"]
    ranks = []
    for node in NODES:
        namespace = ["ip", "netns", "exec", node, "unshare", "--uts", "--mount", "sh", "-c", enter]
        ranks.append(subprocess.Popen([*namespace, node, *launch], stderr=subprocess.PIPE))
    for process in ranks:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors.decode()[-4000:]
    python(*TORCHRUN, *flags, tmp_path / "one")
    for name in ("model.safetensors", "value_head/value_head.safetensors"):
        two, one = (tmp_path / run / "checkpoint-2" / name for run in ("two", "one"))
        assert Path(two).read_bytes() == Path(one).read_bytes()
