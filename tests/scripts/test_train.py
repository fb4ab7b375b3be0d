"""train.py as its users run it, on models of a few thousand parameters."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forks
import pandas
import pytest
import torch
from conftest import ROOT
from helpers import only_run
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import train
from arguments import ModelArguments
from data import DataError
from runs.records import RecordError, Run
from self_speculation import load_model_and_tokenizer
from training.flags import OptimizationArguments, TrainingDataArguments
from training.from_flags import advice_on_dtype, computed_in, trainer_settings
from training.recipe import IGNORED
from training.texts import datasets, load_texts, padded, to_blocks
from training.trainer import EarlyExitTrainer

SMALL = [
    "--vocabulary_size", "300", "--num_layers", "3", "--hidden_size", "16", "--intermediate_size", "24",
    "--num_heads", "2", "--num_kv_heads", "1", "--sequence_length", "32", "--batch_size", "4", "--seed", "1",
    "--warmup_steps", "2", "--learning_rate", "3e-3", "--eval_fraction", "0.2", "--device", "cpu",
]  # fmt: skip
STEPS = ["--num_steps", "12", "--log_steps", "2", "--eval_steps", "6", "--save_steps", "4"]


@pytest.fixture
def texts(tmp_path):
    """A glob of twenty small files."""
    (tmp_path / "texts").mkdir()
    for index in range(20):
        lines = [f"def add_{index}_{line}(a, b):\n    return a + b + {line * index}\n" for line in range(30)]
        (tmp_path / "texts" / f"{index}.py").write_text("\n".join(lines))
    return str(tmp_path / "texts" / "*.py")


def arguments(tmp_path, texts, *more):
    return ["--data_path", texts, "--output_dir", str(tmp_path / "logs"), *SMALL, *STEPS, *more]


def log(folder):
    """What training and evaluation logged, without the clock."""
    frame = pandas.read_csv(folder / "log.csv")
    return frame[[name for name in frame if "loss" in name or name in ("step", "grad_norm", "eval_accuracy")]]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def same_weights(folder, other):
    for name, value in weights(other).items():
        assert torch.equal(value, weights(folder)[name]), name


def run(tmp_path, texts, *more):
    assert train.main(arguments(tmp_path, texts, *more)) == 0
    return only_run(tmp_path)


def killed_at(tmp_path, step, rank=0, by="SIGKILL"):
    """train.py, of which one rank gets a signal when it begins the step after so many."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "from runs.program import run\n"
        "from training.trainer import EarlyExitTrainer\n"
        "step = EarlyExitTrainer.training_step\n"
        "def killed(self, *args, **kwargs):\n"
        f"    if (self.state.global_step, self.args.process_index) == ({step}, {rank}):\n"
        f"        os.kill(os.getpid(), signal.{by})\n"
        "    return step(self, *args, **kwargs)\n"
        "EarlyExitTrainer.training_step = killed\n"
        "run(train.main)\n"
    )
    return program


def test_from_scratch_to_a_folder_for_every_script(tmp_path, texts):
    """The model learns, transformers loads it, generate.py answers with it, the plot and tables are there."""
    folder = run(tmp_path, texts, "--num_steps", "60", "--log_steps", "20")
    frame = log(folder)
    losses = frame["loss"].dropna()
    assert losses.iloc[-1] < losses.iloc[0] - 0.5
    assert {f"eval_loss_exit_{exit}" for exit in (1, 2, 3)} <= set(frame)
    assert list(pandas.read_csv(folder / "exits.csv")["exit_layer"]) == [1, 2, 3]
    assert (folder / "exits.png").stat().st_size > 1000
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    model, tokenizer = load_model_and_tokenizer(str(folder / "model"))
    text = "def add(a, b):\n        return a + 12\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # Guards against line breaks that merge with the indentation after them: a prompt may end in one.
    assert tokenizer.encode(text)[: len(tokenizer.encode("def add(a, b):\n"))] == tokenizer.encode(
        "def add(a, b):\n"
    )
    assert model.config.max_position_embeddings == 32
    # Guards against an end of text that is the padding too, whose embedding stays zero for ever.
    assert model.get_input_embeddings().weight[tokenizer.eos_token_id].abs().sum() > 0
    with torch.no_grad():
        assert model(torch.tensor([ids[:16]])).logits.shape == (1, len(ids[:16]), 300)
    drafts = ["--generation_strategy", "self_speculative", "--exit_layer", 1, "--num_speculations", 3]
    generate = ["--prompt", "def", "--max_steps", 8, "--sample", "False", *drafts]
    result = forks.run(ROOT / "generate.py", "--model", folder / "model", *generate)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_killed_and_resumed_is_the_unbroken_curve(tmp_path, texts):
    """SIGKILL between two checkpoints; resumed, each logged number and each weight is as if never killed."""
    more = ["--layer_dropout", "0.5", "--num_steps", "30", "--save_steps", "7", "--exit_loss", "distill"]
    whole = run(tmp_path, texts, *more)
    parts = tmp_path / "parts"
    parts.mkdir()
    program = killed_at(tmp_path, 10)
    assert forks.run(program, *arguments(parts, texts, *more)).returncode == -signal.SIGKILL
    folder = only_run(parts)
    assert not (folder / "model").exists()
    # A checkpoint that the kill cut short is not taken for one.
    (folder / "checkpoint-29").mkdir()
    (folder / "checkpoint-29" / "trainer_state.json").write_text('{"global_st')
    assert train.main([*arguments(parts, texts, *more), "--resume", str(folder)]) == 0
    pandas.testing.assert_frame_equal(log(folder), log(whole), check_exact=True)
    same_weights(folder, whole)
    # Killed during the last evaluation, or simply resumed once more: not a step beyond the last.
    shutil.rmtree(folder / "model")
    assert train.main(["--resume", str(folder)]) == 0  # by the arguments that it had
    same_weights(folder, whole)
    assert log(folder)["step"].max() == 30


@pytest.mark.parametrize("by", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_a_signal_saves_and_resumed_is_the_unbroken_curve(by, tmp_path, texts):
    """Between two checkpoints and two rows of the log: neither a step nor a part of a mean is lost."""
    more = ["--layer_dropout", "0.5", "--log_steps", "4"]
    whole = run(tmp_path, texts, *more)
    parts = tmp_path / "parts"
    parts.mkdir()
    ended = forks.run(killed_at(tmp_path, 5, by=by), *arguments(parts, texts, *more))
    assert ended.returncode == 128 + getattr(signal, by)
    folder = only_run(parts)
    assert f"interrupted; step 6 is kept, go on with --resume {folder}" in ended.stderr
    assert train.main(["--resume", str(folder)]) == 0
    pandas.testing.assert_frame_equal(log(folder), log(whole), check_exact=True)
    same_weights(folder, whole)


def test_a_signal_while_evaluating_says_how_to_go_on(tmp_path, texts, monkeypatch, capsys):
    """Guards against SIGTERM that ends the last evaluation without a word, the run for ever "running"."""
    evaluate = EarlyExitTrainer.evaluate

    def killed(self, *args, **kwargs):
        if self.state.global_step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(EarlyExitTrainer, "evaluate", killed)
    assert train.main(arguments(tmp_path, texts, "--eval_steps", "50")) == 128 + signal.SIGTERM
    folder = only_run(tmp_path)
    assert "interrupted; step 12 is kept, go on with --resume" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"


def test_a_signal_to_one_rank_ends_all_after_the_same_step(tmp_path, texts):
    command = arguments(tmp_path, texts, "--batch_size", "2")
    ended = forks.run_ranks(2, killed_at(tmp_path, 5, rank=1, by="SIGTERM"), *command)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert "interrupted; step 6 is kept" in ended.stderr


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_keeps_the_last_checkpoint(room, tmp_path, texts, capsys, monkeypatch):
    """Without room, the two there are stay; with room for one in place of the oldest, that is made."""
    save, failures = torch.save, []

    def no_room(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(thing, path, *args, **kwargs):
        kept = len(list(only_run(tmp_path).glob("checkpoint-*")))
        if "checkpoint-12" in str(path) and kept > 1 + room:
            failures.append(path)
            monkeypatch.setattr("runs.failures.try_to_write", no_room)
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        return save(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    status = train.main(arguments(tmp_path, texts))
    folder, error = only_run(tmp_path), capsys.readouterr().err
    assert failures
    if room:
        assert status == 0
        assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-12"}
        return
    assert status == 1
    assert f"cannot write {folder}/checkpoint-12: [enforce fail" in error
    assert "step 8 is kept, go on with" in error
    monkeypatch.undo()
    assert train.main(["--resume", str(folder)]) == 0
    (tmp_path / "whole").mkdir()
    same_weights(folder, run(tmp_path / "whole", texts))


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError("no memory left"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_another_error_than_a_full_disk_keeps_both_checkpoints(error, tmp_path, texts, capsys, monkeypatch):
    """Guards against an older checkpoint that is deleted for nothing: without permission, or without memory,
    the new one cannot be written in its place either.
    """
    save = torch.save

    def fails(thing, path, *args, **kwargs):
        if "checkpoint-12" in str(path):
            raise error
        return save(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fails)
    assert train.main(arguments(tmp_path, texts)) == 1
    folder = only_run(tmp_path)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    said = f"cannot write {folder}/checkpoint-12: {error}; step 8 is kept, go on with --resume {folder}"
    assert said in capsys.readouterr().err


def test_a_model_that_cannot_be_written_is_kept(tmp_path, texts, capsys, monkeypatch):
    """The disk is full in the very end: one line, and the last step is there to be written again."""
    save = LlamaForCausalLM.save_pretrained

    def full(self, folder, **kwargs):
        if str(folder).endswith("model"):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(self, folder, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    assert train.main(arguments(tmp_path, texts)) == 1
    assert "No space left on device (os error 28); step 12 is kept, go on with" in capsys.readouterr().err
    monkeypatch.undo()
    assert train.main(["--resume", str(only_run(tmp_path))]) == 0


def test_a_full_disk_of_one_rank_ends_all(tmp_path, texts):
    """Guards against ranks that wait in a checkpoint for the one that could not begin it."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import pathlib, train\n"
        "from runs.program import run\n"
        "write = pathlib.Path.write_text\n"
        "def full(self, text, *args, **kwargs):\n"
        "    if self.name == 'running_loss.json' and self.parent.name == 'checkpoint-4':\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    return write(self, text, *args, **kwargs)\n"
        "pathlib.Path.write_text = full\n"
        "run(train.main)\n"
    )
    ended = forks.run_ranks(2, program, *arguments(tmp_path, texts, "--batch_size", "2"))
    assert ended.returncode == 1
    assert "checkpoint-4: [Errno 28] No space left on device; no checkpoint was written yet" in ended.stderr


def test_a_log_that_cannot_be_written_ends_with_a_checkpoint(tmp_path, texts, capsys, monkeypatch):
    """Guards against all steps since the last checkpoint being lost to a row of a table."""
    replace = Run.replace

    def full(self, name, text):
        if name == "log.csv" and "\n6," in text:
            raise RecordError(f"cannot write {self.folder / name}: No space left on device")
        replace(self, name, text)

    monkeypatch.setattr(Run, "replace", full)
    assert train.main(arguments(tmp_path, texts)) == 1
    error = capsys.readouterr().err
    assert "log.csv: No space left on device; step 7 is kept, go on with --resume" in error


def test_resume_refuses_another_recipe(tmp_path, texts, capsys):
    """Passes may be others, if a step still has as many samples."""
    folder = run(tmp_path, texts)
    for flags, message in (
        (["--rotation", "3"], "that run had --rotation 8, this one has 3"),
        (["--batch_size", "2"], "a step of that run has 4 samples, this one's 2: ranks, --batch_size and"),
    ):
        with pytest.raises(SystemExit) as exit:
            train.main([*arguments(tmp_path, texts, *flags), "--resume", str(folder)])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
    shutil.rmtree(folder / "checkpoint-12")
    passes = ["--batch_size", "2", "--gradient_accumulation", "2"]
    assert train.main(["--resume", str(folder), *passes]) == 0
    assert log(folder)["step"].max() == 12


def test_a_finished_training_goes_on_for_more_steps(tmp_path, texts, capsys, monkeypatch):
    """From its last checkpoint, not from the start; killed in the middle, it has not forgotten how many."""
    folder = run(tmp_path, texts)
    seen, step = [], EarlyExitTrainer.training_step

    def interrupted(self, *args, **kwargs):
        seen.append(self.state.global_step)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(EarlyExitTrainer, "training_step", interrupted)
    assert train.main(["--resume", str(folder), "--num_steps", "20"]) == 130
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert "step 16 is kept" in capsys.readouterr().err
    assert train.main(["--resume", str(folder)]) == 0
    assert seen == [*range(12, 18), *range(16, 20)]
    assert log(folder)["step"].max() == 20
    described = json.loads((folder / "run.json").read_text())
    assert (described["status"], described["arguments"]["num_steps"]) == ("finished", 20)
    with pytest.raises(SystemExit):
        train.main(["--resume", str(folder), "--num_steps", "15"])
    assert "that run had --num_steps 20, this one has 15" in capsys.readouterr().err


def similar(folder, other):
    """Losses, gradients and final weights, up to the order of sums."""
    for columns in (["step", "loss", "grad_norm"], ["step", "eval_loss"]):
        left, right = (log(each)[columns].dropna() for each in (folder, other))
        pandas.testing.assert_frame_equal(left, right, rtol=1e-3)
    for name, value in weights(other).items():
        # Saved in bfloat16. Where a gradient is all but 0, its sign is chance, and that is AdamW's step.
        assert (weights(folder)[name] - value).norm() < 0.02 * value.norm(), name


DROPPING = ["--layer_dropout", "0.7", "--exit_weighting", "equal", "--rotation", "2"]


@pytest.mark.parametrize("parallel", [pytest.param("data", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_learn_what_one_does(parallel, tmp_path, texts):
    """Guards against drops that depend on how samples are shared out, and against a rank that waits for ever
    since another one skipped a layer: at this dropout, all samples of a rank often do.
    """
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = run(tmp_path / "one", texts, *DROPPING)
    shared = ["--parallel", parallel, "--batch_size", 1, "--gradient_accumulation", 2]
    result = forks.run_ranks(2, ROOT / "train.py", *arguments(tmp_path / "two", texts, *DROPPING, *shared))
    assert result.returncode == 0, result.stderr
    similar(only_run(tmp_path / "two"), one)


@pytest.mark.slow
def test_shares_that_were_killed_go_on_with_other_ranks(tmp_path, texts, model_folder):
    """One of two ranks is killed; four go on from its sharded checkpoint to where one process gets, from a
    model of which only the first rank reads the weights, with checkpointing. generate.py drafts with it.
    """
    more = [*DROPPING, "--model", str(model_folder), "--exit_loss", "distill"]
    (tmp_path / "one").mkdir()
    whole = run(tmp_path / "one", texts, *more)
    program = killed_at(tmp_path, 10, rank=1)
    shared = [*arguments(tmp_path, texts, *more), "--parallel", "fsdp", "--gradient_checkpointing"]
    assert forks.run_ranks(2, program, *shared, "--batch_size", "2").returncode != 0
    folder = only_run(tmp_path)
    assert (folder / "checkpoint-8" / "pytorch_model_fsdp_0").is_dir()
    wrong = forks.run_ranks(4, ROOT / "train.py", "--resume", folder)
    assert wrong.returncode == 2
    assert "a step of that run has 4 samples, this one's 8: ranks, --batch_size and" in wrong.stderr
    result = forks.run_ranks(4, ROOT / "train.py", "--resume", folder, "--batch_size", "1")
    assert result.returncode == 0, result.stderr
    similar(folder, whole)
    shutil.rmtree(folder / "model")  # killed during the last evaluation
    again = forks.run_ranks(4, ROOT / "train.py", "--resume", folder)
    assert again.returncode == 0, again.stderr
    similar(folder, whole)
    drafts = ["--generation_strategy", "self_speculative", "--exit_layer", 1, "--num_speculations", 3]
    generate = ["--prompt", "def", "--max_steps", 8, "--sample", "False", *drafts]
    assert forks.run(ROOT / "generate.py", "--model", folder / "model", *generate).returncode == 0


def with_peft(ranks, program, *args):
    """In processes of their own: transformers looks for peft, which `make test` keeps apart, but once."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks] if ranks > 1 else []
    own = {"PYTHONPATH": f"{Path(sys.prefix) / 'lora'}{os.pathsep}{ROOT}"}
    command = [*map(str, [sys.executable, *launcher, program, *args])]
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_adapter_learns_alone(ranks, tmp_path, texts, model_folder):
    """Killed and resumed; checkpoints hold no weights of the model, and what is merged is the model and the
    adapter beside it: its head and norms are those it had.
    """
    more = ["--model", str(model_folder), "--lora_rank", "4", "--exit_loss", "distill"]
    more += ["--num_steps", "20", "--learning_rate", "3e-2"]
    if ranks > 1:
        more += ["--parallel", "fsdp", "--batch_size", "2"]
    ways = {}
    for name, step in (("whole", 99), ("parts", 10)):
        (tmp_path / name).mkdir()
        program = killed_at(tmp_path, step)
        result = with_peft(ranks, program, *arguments(tmp_path / name, texts, *more))
        assert (result.returncode == 0) == (name == "whole"), result.stderr
        ways[name] = only_run(tmp_path / name)
    assert {path.name for path in ways["parts"].glob("checkpoint-8/*model*")} == (
        {"adapter_model.safetensors"} if ranks == 1 else {"pytorch_model_fsdp_0"}
    )
    result = with_peft(ranks, ROOT / "train.py", "--resume", ways["parts"])
    assert result.returncode == 0, result.stderr
    pandas.testing.assert_frame_equal(log(ways["parts"]), log(ways["whole"]), check_exact=ranks == 1)
    losses = log(ways["whole"])["loss"].dropna()
    assert losses.iloc[-1] < losses.iloc[0] - 0.1
    before, after = AutoModelForCausalLM.from_pretrained(model_folder).state_dict(), weights(ways["parts"])
    changed = {name for name, value in before.items() if not torch.equal(value.bfloat16(), after[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
    says = json.loads((ways["parts"] / "adapter" / "adapter_config.json").read_text())
    assert says["base_model_name_or_path"] == str(model_folder.resolve())  # from wherever it is loaded
    check = tmp_path / "check.py"
    check.write_text(
        "import sys, torch\n"
        "from self_speculation import load_model_and_tokenizer as load\n"
        "ids = torch.tensor([[5, 6, 7, 8]])\n"
        "merged, adapted, plain = (load(name)[0](ids).logits.float() for name in sys.argv[1:])\n"
        "assert (merged - adapted).norm() < 0.02 * adapted.norm() < 0.2 * (plain - adapted).norm()\n"
    )
    result = with_peft(1, check, ways["parts"] / "model", ways["parts"] / "adapter", model_folder)
    assert result.returncode == 0, result.stderr
    if ranks == 1:  # Guards against weights that stay frozen after a merge, and an adapter of an adapter.
        (tmp_path / "further").mkdir()
        again = arguments(tmp_path / "further", texts, "--model", str(ways["parts"] / "adapter"))
        assert with_peft(1, ROOT / "train.py", *again).returncode == 0
        refused = with_peft(1, ROOT / "train.py", *again, "--lora_rank", "2")
        assert refused.returncode == 2
        assert "adapter is an adapter, and one on top of it would be of no use" in refused.stderr


def test_accumulated_passes_are_one_step(tmp_path):
    """Two passes of two samples against one of four, with padding: guards against a mean of means."""
    rows = [{"prompt": f"what is {i} ", "response": "x" * (1 + 7 * (i % 4)) + str(i)} for i in range(60)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = []
    for name, more in (("one", ()), ("two", ("--batch_size", "2", "--gradient_accumulation", "2"))):
        (tmp_path / name).mkdir()
        folder = run(tmp_path / name, str(path), "--layer_dropout", "0", *more)
        curves.append(log(folder)[["step", "loss", "grad_norm"]].dropna())
    pandas.testing.assert_frame_equal(*curves, rtol=1e-4)


def test_going_on_with_a_model(tmp_path, texts, model_folder):
    """Continual pretraining: its tokenizer and shape, other weights; checkpointing changes nothing."""
    curves = []
    for name, more in (("plain", ()), ("checkpointed", ("--gradient_checkpointing",))):
        (tmp_path / name).mkdir()
        folder = run(tmp_path / name, texts, "--model", str(model_folder), "--layer_dropout", "0.5", *more)
        curves.append(log(folder))
    pandas.testing.assert_frame_equal(*curves, rtol=1e-4)
    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    after = weights(folder)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name].bfloat16(), after[name]) for name in before)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (model_folder, folder / "model")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_mixed_precision(tmp_path, texts):
    frame = log(run(tmp_path, texts, "--dtype", "bfloat16", "--curriculum", "gradual"))
    assert frame["loss"].dropna().iloc[-1] < frame["loss"].dropna().iloc[0]


def test_a_loss_that_is_no_number_ends_the_training(tmp_path, texts, capsys):
    """Guards against an average that leaves such losses out, which is what the trainer does by itself."""
    assert train.main(arguments(tmp_path, texts, "--learning_rate", "1e30", "--warmup_steps", "0")) == 1
    error = capsys.readouterr().err
    assert re.search(r"\n(a loss|the gradient) is (nan|inf) at step [234], of .*texts/\d+\.py", error)
    assert (
        "look at them, or begin anew with a lower --learning_rate; no checkpoint was written yet\n" in error
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer_dropout", "1.5"], "--layer_dropout 1.5: must be between 0 and 1"),
        (["--early_exit_scale", "-1"], "--early_exit_scale -1.0: must be 0 or more"),
        (["--rotation", "0"], "--rotation 0: must be at least 1"),
        (["--exits", "1", "3"], "--exits [1, 3]: must be between 1 and 2"),
        (["--num_kv_heads", "3"], "--num_kv_heads 3: must divide --num_heads 2"),
        (["--hidden_size", "18"], "--hidden_size 18: must be a multiple of 2 x num_heads"),
        (["--learning_rate", "0"], "--learning_rate 0.0: must be above 0"),
        (["--eval_fraction", "1"], "--eval_fraction 1.0: must be between 0 and 1"),
        (["--num_steps", "0"], "--num_steps 0: must be at least 1"),
        (["--warmup_steps", "12"], "--warmup_steps 12: must be below --num_steps 12"),
        (["--dtype", "float16"], "--dtype float16: mixed precision on a CPU is bfloat16"),
        (["--parallel", "fsdp"], "--parallel fsdp: shares a model out between processes; start two or more"),
        (["--quantization", "int8"], "--quantization int8: training knows none only"),
        (["--offload"], "--offload True: is for --parallel fsdp"),
        (["--lora_rank", "2"], "--lora_rank 2: needs a --model to adapt"),
        (
            ["--device", "cuda:1"],
            "--device cuda:1: must be auto, cpu, cuda or mps; CUDA_VISIBLE_DEVICES=1 ch",
        ),
    ],
)
def test_bad_values_are_refused_before_the_data_is_read(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(arguments(tmp_path, "no/such/*.txt", *flags))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_refuses_all_leave_together(rank, tmp_path, texts):
    """Guards against ranks that wait for one that has refused something, and end with errors of their own."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train, training.run\n"
        "from runs.program import run\n"
        "load = training.run.load_texts\n"
        "def refused(args):\n"
        f"    if os.environ['RANK'] == '{rank}':\n"
        "        raise ValueError('data_path x: no such files')\n"
        "    return load(args)\n"
        "training.run.load_texts = refused\n"
        "run(train.main)\n"
    )
    ended = forks.run_ranks(2, program, *arguments(tmp_path, texts))
    assert ended.returncode != 0
    assert ended.stderr == "program.py: error: --data_path x: no such files\n"


def test_on_a_gpu_auto_is_tf32_and_says_what_is_faster(tmp_path, monkeypatch):
    """Guards against products in strict fp32 that nobody asked for, and TF32 where fp32 was asked for."""
    for name in ("training.from_flags", "transformers.training_args"):
        monkeypatch.setattr(f"{name}.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", (switched := []).append)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for dtype, computed, is_tf32 in (("auto", "TF32", True), ("float32", "float32", False)):
        switched.clear()
        trainer_settings(OptimizationArguments(), ModelArguments(dtype=dtype, compile=True), tmp_path, gpu)
        assert switched[-1] == is_tf32
        assert computed_in(dtype, gpu) == computed
    assert computed_in("bfloat16", gpu) == "bfloat16"
    assert computed_in("auto", cpu) == "float32"
    assert (
        advice_on_dtype("auto", gpu)
        == "products in TF32; --dtype bfloat16 takes less time and memory than float32"
    )
    assert advice_on_dtype("float32", gpu) is advice_on_dtype("auto", cpu) is None


def test_a_folder_that_cannot_be_written_is_refused_before_data_are_read(tmp_path, capsys, monkeypatch):
    """Guards against a corpus that is read and tokenised for a training whose folder is read-only."""
    monkeypatch.setattr("training.run.load_texts", lambda *_: pytest.fail("data are read"))
    with pytest.raises(SystemExit) as exit:
        train.main(arguments(tmp_path, "no/such/*.txt", "--output_dir", "/proc"))
    assert exit.value.code == 2
    assert "--output_dir /proc: cannot be written (" in capsys.readouterr().err


def test_samples_longer_than_the_context_are_refused(tmp_path, model_folder, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(
            [*arguments(tmp_path, "no/such/*"), "--model", str(model_folder), "--sequence_length", "257"]
        )
    assert exit.value.code == 2
    assert "--sequence_length 257: must be at most 256" in capsys.readouterr().err


def data_arguments(path, **more):
    return TrainingDataArguments(data_path=str(path), eval_fraction=more.pop("eval_fraction", 0.3), **more)


def test_formats_say_the_same(tmp_path):
    """JSONL, CSV, Parquet and plain files: which texts are held out depends on the texts alone."""
    texts = [f"text number {i}" for i in range(30)]
    frame = pandas.DataFrame({"content": texts, "other": range(30)})
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text)
    found = [
        tuple(sorted(part["text"]) for part in load_texts(data_arguments(tmp_path / name, text_column=c)))
        for name, c in (
            ("a.jsonl", "content"),
            ("a.csv", "content"),
            ("a.parquet", "content"),
            ("*.txt", "text"),
        )
    ]
    assert found[1:] == found[:1] * 3
    training, evaluation = found[0]
    assert sorted(training + evaluation) == sorted(texts)
    assert not set(training) & set(evaluation)


def test_what_is_wrong_with_the_data(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"content": \n')
    (tmp_path / "c.txt").write_text("x")
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    for name, message in (
        ("none*", "no such files"),
        ("a.jsonl", "--text_column text: not in the data, which has content"),
        ("b.jsonl", "b.jsonl, line 1: not JSON"),
        ("", 'is a folder; name its files: ".*/\\*\\*/\\*.jsonl"'),
        ("d.jsonl", "d.jsonl, line 2: column 'text' must be text, not NoneType"),
        ("c.txt", "leaves nothing of 1 texts for"),
    ):
        with pytest.raises(DataError, match=message) as error:
            load_texts(data_arguments(tmp_path / name))
        assert "\n" not in str(error.value)


def test_files_of_several_formats_and_with_a_byte_order_mark(tmp_path):
    """Guards against a mark of Windows that becomes part of a text or of a column's name."""
    mark = "\ufeff".encode()
    (tmp_path / "a.csv").write_bytes(mark + b"prompt,response\r\n" + b"1,2\r\n" * 9)
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"prompt": "3", "response": "4", "more": 5}\n' * 9)
    parts = load_texts(data_arguments(tmp_path / "*", eval_fraction=0.5))
    assert {(row["prompt"], row["response"]) for part in parts for row in part} == {("1", "2"), ("3", "4")}
    for number in range(9):
        (tmp_path / f"{number}.txt").write_bytes(mark + str(number).encode())
    parts = load_texts(data_arguments(tmp_path / "*.txt", eval_fraction=0.5))
    assert sorted(int(text) for part in parts for text in part["text"]) == list(range(9))


def test_a_file_that_has_changed_is_read_again(tmp_path):
    """Guards against a training on what a file held before."""
    path = tmp_path / "a.jsonl"
    for word in ("old", "new"):
        path.write_text("".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(9)))
        parts = load_texts(data_arguments(path))
        assert {text.split()[0] for part in parts for text in part["text"]} == {word}


def test_no_file_of_the_standard_library_is_on_both_sides():
    args = TrainingDataArguments()
    training, evaluation = load_texts(args)
    assert not set(training["text"]) & set(evaluation["text"])
    assert 0.02 < len(evaluation) / (len(evaluation) + len(training)) < 0.1
    assert any("def dataclass(" in text for text in (*training["text"], *evaluation["text"]))


def test_blocks_lose_nothing_but_the_tail(byte_tokenizer):
    """Guards against texts without an end between them, and against a tail lost every 1000 texts."""
    dataset = datasets.Dataset.from_dict({"text": ["abc def", "ghi", "jkl mno"] * 700})
    blocks = to_blocks(dataset, byte_tokenizer, 4, seed=0)
    ids = [token for block in blocks["input_ids"] for token in block]
    assert blocks["labels"] == blocks["input_ids"]
    shuffled = dataset.shuffle(0)["text"]
    expected = [t for text in shuffled for t in [*byte_tokenizer.encode(text, add_special_tokens=False), 2]]
    assert ids == expected[: len(ids)]
    assert len(expected) - len(ids) < 4


def test_prompts_are_masked(byte_tokenizer):
    """Only the response and its end are learnt; a prompt that fills the block is left out."""
    rows = {"prompt": ["ab", "x" * 50], "response": ["cd", "y"]}
    dataset = datasets.Dataset.from_dict(rows)
    (block,) = to_blocks(dataset, byte_tokenizer, 12, seed=0)
    prompt = byte_tokenizer("ab")["input_ids"]
    response = [*byte_tokenizer("cd", add_special_tokens=False)["input_ids"], byte_tokenizer.eos_token_id]
    assert block["input_ids"] == prompt + response
    assert block["labels"] == [IGNORED] * len(prompt) + response
    assert block["documents"][0] == block["documents"][1]
    batch = padded(0, [block, {"input_ids": [5], "labels": [5], "documents": [0, 0]}])
    assert batch["labels"][1].tolist() == [5] + [IGNORED] * (len(block["labels"]) - 1)


@pytest.fixture
def stream(tmp_path):
    """Flags for a dataset of two files, which is never whole and shorter than the training."""
    (tmp_path / "hub").mkdir()
    for name in ("a", "b"):
        rows = [{"text": f"def {name}{i}(x):\n    return x + {i * i}\n" * 2} for i in range(12)]
        (tmp_path / "hub" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--eval_samples", "2", "--num_steps", "16", "--layer_dropout", "0.5"]
    return ["--data", str(tmp_path / "hub"), "--streaming", *SMALL, *STEPS, *more]


def streamed(tmp_path, name, program, *flags, ranks=1, status=0):
    (tmp_path / name).mkdir()
    result = forks.run_ranks(ranks, program, *flags, "--output_dir", tmp_path / name / "logs")
    assert result.returncode == status, result.stderr
    return only_run(tmp_path / name)


def test_a_stream_is_read_while_training(tmp_path, stream):
    """Several times, by steps of several passes: the same samples again after a resumption."""
    stream += ["--batch_size", "2", "--gradient_accumulation", "3"]
    whole = streamed(tmp_path, "whole", ROOT / "train.py", *stream)
    ended = killed_at(tmp_path, 13, by="SIGTERM")
    folder = streamed(tmp_path, "parts", ended, *stream, status=128 + signal.SIGTERM)
    assert train.main(["--resume", str(folder)]) == 0
    pandas.testing.assert_frame_equal(log(folder), log(whole), check_exact=True)
    assert log(whole)["loss"].max() < 7  # no step has twice as many samples
    with pytest.raises(SystemExit):
        train.main(arguments(tmp_path, "no/such/*", "--streaming"))


@pytest.mark.slow
def test_ranks_share_a_stream_out(tmp_path, stream):
    """Guards against ranks that read files of their own: other samples, and one of them ends earlier."""
    one = streamed(tmp_path, "one", ROOT / "train.py", *stream)
    similar(streamed(tmp_path, "two", ROOT / "train.py", *stream, "--batch_size", "2", ranks=2), one)
