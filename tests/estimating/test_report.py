"""`axolotl-medusa estimate`: what it prints, and how it ends on bad input."""

from __future__ import annotations

import json

import pytest
import yaml
from estimated_plans import CONFIG, MEDUSA_1, MEDUSA_2

from axolotl_medusa.cli import main
from axolotl_medusa.estimating.memory import GIB
from axolotl_medusa.estimating.plan import ENGINES

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def yaml_file(tmp_path):
    """A YAML whose model is a directory with a config alone; keys may be given."""

    def write(cfg=MEDUSA_2, **keys):
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(CONFIG))
        file = tmp_path / "x.yml"
        file.write_text(yaml.safe_dump({**cfg, "base_model": str(model), **keys}))
        return str(file)

    return write


def test_estimate_says_parameters_parts_peak_and_network(yaml_file, capsys):
    assert main(["estimate", yaml_file(), "--gpus", "16", "--tokens-per-s", "1000"]) == 0
    out = capsys.readouterr().out
    assert "Medusa-2 with LoRA, 3 separate heads" in out
    assert "2 x 2048 tokens a micro-batch, 4 a step; adamw_torch_fused; ddp, 16 GPUs" in out
    for part in ("base 1,498,482,688", "base model", "optimizer state", "activations", "CUDA, libraries", "peak"):
        assert part in out
    peaks, sent = (out.split(title)[1].split("\n\n")[0] for title in ("GiB at the peak", "GB that a GPU sends"))
    assert peaks.splitlines()[0].split()[-5:] == ["1", "2", "4", "8", "16"]
    assert sent.splitlines()[0].split()[-4:] == ["2", "4", "8", "16"]
    assert all(engine in peaks and engine in sent for engine in ENGINES)
    assert "time: 62 s for a million tokens" in out
    assert "fit" not in out


def test_estimate_as_json_has_the_same_numbers(yaml_file, capsys):
    assert main(["estimate", yaml_file(), "--json", "--gpu-gib", "8", "--tokens-per-s", "2000"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = dict(found["bytes_of_a_gpu"])
    assert parts.pop("peak") == pytest.approx(sum(parts.values()))
    assert found["peak_bytes_by_engine_and_gpus"]["ddp"]["1"] == found["bytes_of_a_gpu"]["peak"]
    assert found["bytes_sent_by_a_gpu_per_step"]["ddp"]["1"] == 0
    assert found["seconds_per_million_tokens"] == 500
    assert found["fits"] is False and found["changes"][0]["yaml"][0].startswith("micro_batch_size: 1")


def test_estimate_of_what_fits_and_of_what_does_not(yaml_file, capsys):
    assert main(["estimate", yaml_file(MEDUSA_1), "--gpu-gib", "80"]) == 0
    assert capsys.readouterr().out.endswith("It fits in 80 GiB.\n")
    assert main(["estimate", yaml_file(MEDUSA_1), "--gpu-gib", "8"]) == 0
    lines = capsys.readouterr().out.split("It does not fit in 8 GiB. Change, in this order:\n")[1].splitlines()
    assert lines[0].split(" GiB with ")[1] == "optimizer: adamw_bnb_8bit  (the optimizer's state is rounded to 8 bits)"
    assert float(lines[-1].split()[0]) <= 8
    assert main(["estimate", yaml_file(MEDUSA_1), "--gpu-gib", "0.5"]) == 0
    assert "Even then it does not fit" in capsys.readouterr().out


def test_estimate_on_a_cpu_counts_processes(yaml_file, capsys):
    assert main(["estimate", yaml_file(MEDUSA_1), "--cpu", "--json"]) == 0
    on_cpu = json.loads(capsys.readouterr().out)
    assert on_cpu["device"] == "cpu" and on_cpu["bytes_of_a_gpu"]["runtime"] < GIB
    assert main(["estimate", yaml_file(MEDUSA_1), "--cpu"]) == 0
    out = capsys.readouterr().out
    assert "by number of processes" in out and "Python" in out and "GPU" not in out


def test_estimate_does_not_need_axolotl(yaml_file):
    import subprocess
    import sys

    code = (
        "import sys\nfrom axolotl_medusa.cli import main\n"
        "assert main(['estimate', sys.argv[1]]) == 0\nassert 'axolotl' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, yaml_file()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "keys", "reason"),
    [
        ([], {"base_model": "org/never-downloaded"}, "its config is not in the Hub's cache"),
        ([], {"base_model": "./nowhere"}, "base_model ./nowhere does not exist"),
        (["--engine", "megatron"], {}, "engine megatron is not known: expected ddp"),
        (["--gpus", "0"], {}, "the number of GPUs is 0"),
        (["--gpu-gib", "-1"], {}, "--gpu-gib is -1: expected a number above 0"),
        (["--tokens-per-s", "nan"], {}, "--tokens-per-s is nan: expected a number above 0"),
        ([], {"medusa_num_heads": 0}, "medusa_num_heads: Input should be greater than or equal to 1"),
    ],
    ids=str,
)
def test_estimate_of_bad_input_is_one_line(arguments, keys, reason, yaml_file, capsys):
    assert main(["estimate", yaml_file(**keys), *arguments]) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("axolotl-medusa estimate: error: ") and streams.err.count("\n") == 1
    assert reason in streams.err
