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
from pkgutil import resolve_name
from unittest.mock import Mock

import forks
import pandas
import pytest
import torch
from conftest import ROOT, assert_close
from helpers import about, only_run, refused
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import train
from arguments import ModelArguments
from data import DataError
from runs.records import RecordError, Run
from self_speculation import load_model_and_tokenizer
from training.flags import OptimizationArguments
from training.from_flags import computed_in, trainer_settings
from training.trainer import EarlyExitTrainer

SMALL = [
    "--vocabulary_size", "300", "--num_layers", "3", "--hidden_size", "16", "--intermediate_size", "24",
    "--num_heads", "2", "--num_kv_heads", "1", "--sequence_length", "32", "--batch_size", "4", "--seed", "1",
    "--warmup_steps", "2", "--learning_rate", "3e-3", "--eval_fraction", "0.2", "--device", "cpu",
]  # fmt: skip
STEPS = ["--num_steps", "12", "--log_steps", "2", "--eval_steps", "6", "--save_steps", "4"]
DRAFTS = ["--generation_strategy", "self_speculative", "--exit_layer", 1, "--num_speculations", 3]
GENERATE = ["--prompt", "def", "--max_steps", 8, "--sample", "False", *DRAFTS]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A glob of twenty small files."""
    folder = tmp_path_factory.mktemp("texts")
    for index in range(20):
        lines = [f"def add_{index}_{line}(a, b):\n    return a + b + {line * index}\n" for line in range(30)]
        (folder / f"{index}.py").write_text("\n".join(lines))
    return str(folder / "*.py")


def arguments(tmp_path, texts, *more):
    return ["--data_path", texts, "--output_dir", str(tmp_path / "logs"), *SMALL, *STEPS, *more]


def log(folder):
    """The logged numbers of training and evaluation, without times."""
    frame = pandas.read_csv(folder / "log.csv")
    return frame[[name for name in frame if "loss" in name or name in ("step", "grad_norm", "eval_accuracy")]]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def assert_learns(frame, by):
    """The training loss falls by so much."""
    losses = frame["loss"].dropna()
    assert losses.iloc[-1] < losses.iloc[0] - by


def assert_same(folder, other):
    """Every logged number and every weight, to the last bit."""
    pandas.testing.assert_frame_equal(log(folder), log(other), check_exact=True)
    for name, value in weights(other).items():
        assert torch.equal(value, weights(folder)[name]), name


def assert_similar(folder, other):
    """Losses, gradients and final weights, up to the order of sums."""
    for columns in (["step", "loss", "grad_norm"], ["step", "eval_loss"]):
        left, right = (log(each)[columns].dropna() for each in (folder, other))
        pandas.testing.assert_frame_equal(left, right, rtol=1e-3)
    for name, value in weights(other).items():
        # Saved in bfloat16. The sign of a gradient near 0 is chance, and AdamW steps by the sign.
        assert (weights(folder)[name] - value).norm() < 0.02 * value.norm(), name


def run(tmp_path, texts, *more):
    assert train.main(arguments(tmp_path, texts, *more)) == 0
    return only_run(tmp_path)


def checkpoints(folder):
    return {int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")}


def program(tmp_path, patch):
    """train.py with a patch by the functions below, for processes of their own."""
    path = tmp_path / "program.py"
    path.write_text(
        f"import sys; sys.path[:0] = {[str(ROOT), f'{ROOT}/tests', f'{ROOT}/tests/scripts']}\n"
        "from test_train import *\n"
        f"{patch}(pytest.MonkeyPatch())\n"
        "from runs import program; program.run(train.main)\n"
    )
    return path


def test_from_scratch_to_a_folder_for_every_script(tmp_path, texts):
    """Guards against a training that learns nothing, and against results that no script or transformers
    reads.
    """
    folder = run(tmp_path, texts, "--num_steps", "60", "--log_steps", "20")
    frame = log(folder)
    assert_learns(frame, 0.5)
    assert {f"eval_loss_exit_{exit}" for exit in (1, 2, 3)} <= set(frame)
    assert list(pandas.read_csv(folder / "exits.csv")["exit_layer"]) == [1, 2, 3]
    assert (folder / "exits.png").stat().st_size > 1000
    assert about(folder)["status"] == "finished"
    model, tokenizer = load_model_and_tokenizer(str(folder / "model"))
    first, second = "def add(a, b):\n", "        return a + 12\n"
    ids = tokenizer.encode(first + second)
    assert tokenizer.decode(ids) == first + second
    # A prompt may end in a line break, so it must not merge with the indentation after it.
    assert ids == tokenizer.encode(first) + tokenizer.encode(second)
    assert model.config.max_position_embeddings == 32
    # If the end of a text were padding, too, its embedding would stay zero.
    assert model.get_input_embeddings().weight[tokenizer.eos_token_id].abs().sum() > 0
    result = forks.run(ROOT / "generate.py", "--model", folder / "model", *GENERATE)
    assert result.returncode == 0, result.stderr


KILLED = BaseException("SIGKILL, as far as files show it: no code of the product handles it")


def raises(error):
    return Mock(side_effect=error)


def sends(number):
    return lambda: os.kill(os.getpid(), number)


def before(owner, name, event, when):
    """A patch: call `event` before the calls of a function whose arguments meet a condition."""

    def patch(monkeypatch):
        original = getattr(owner, name)

        def patched(*args, **kwargs):
            if when(*args):
                event()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, patched)

    return patch


def at_step(step, event, rank=0):
    """A patch: call `event` when a rank begins the step after this one."""
    place = step, rank
    return before(
        EarlyExitTrainer, "training_step", event,
        lambda own, *_: (own.state.global_step, own.args.process_index) == place,
    )  # fmt: skip


def at_rank(rank, owner, name, error):
    """A patch: a function raises an error at one rank."""
    return before(resolve_name(owner), name, raises(error), lambda *_: os.environ["RANK"] == str(rank))


def in_last_checkpoint(event):
    """A patch: call `event` when `torch.save` writes the last of three checkpoints."""
    return before(torch, "save", event, lambda _, path, *__: "checkpoint-12" in str(path))


def on_full_disk(monkeypatch):
    """A patch: torch raises an error that does not tell that the disk is full."""
    no_space = raises(OSError(errno.ENOSPC, "No space"))
    monkeypatch.setattr("training.trainer.try_to_write", no_space)
    in_last_checkpoint(raises(RuntimeError("[enforce fail at inline_container.cc:672]")))(monkeypatch)


LOG_LOST = raises(RecordError("cannot write log.csv: No space left on device"))
MODEL_LOST = raises(SafetensorError("I/O error: No space left on device (os error 28)"))
SIGTERM = sends(signal.SIGTERM)
EXACT = ["--layer_dropout", "0.5", "--exit_loss", "distill", "--log_steps", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, texts):
    """An uninterrupted training."""
    return run(tmp_path_factory.mktemp("whole"), texts, *EXACT)


@pytest.mark.parametrize(
    ("patch", "status", "kept", "message"),
    [
        (at_step(5, raises(KILLED)), None, {4}, None),
        (at_step(5, sends(signal.SIGINT)), 130, {4, 6}, "interrupted; step 6 is kept"),
        (at_step(5, SIGTERM), 143, {4, 6}, "interrupted; step 6 is kept"),
        (at_step(5, raises(DataError("a row of a stream"))), 1, {4}, "a row of a stream; step 4 is kept"),
        (in_last_checkpoint(SIGTERM), 143, {8, 12}, "interrupted; step 12 is kept"),
        (
            before(EarlyExitTrainer, "evaluate", SIGTERM, lambda own, *held_out: held_out),  # the last one
            143, {8, 12}, "interrupted; step 12 is kept",
        ),
        (on_full_disk, 1, {4, 8}, "cannot write {folder}/checkpoint-12: [Errno 28] No space; step 8 is kept"),
        (
            before(Run, "replace", LOG_LOST, lambda _, name, text: name == "log.csv" and "\n6," in text),
            1, {4, 7}, "cannot write log.csv: No space left on device; step 7 is kept",
        ),
        (
            before(LlamaForCausalLM, "save_pretrained", MODEL_LOST, lambda _, to: str(to).endswith("/model")),
            1, {8, 12}, "No space left on device (os error 28); step 12 is kept",
        ),
    ],
    ids=["SIGKILL", "SIGINT", "SIGTERM", "data", "checkpoint", "evaluation", "disk_full", "log", "model"],
)  # fmt: skip
def test_an_interrupted_run_keeps_its_checkpoints_and_continues(
    patch, status, kept, message, tmp_path, texts, whole, capsys, monkeypatch
):
    """Guards against a lost checkpoint or signal, and against a resumption that learns something else: every
    logged number and every weight is that of an uninterrupted run.
    """
    with monkeypatch.context() as context:
        patch(context)
        if status is None:
            with pytest.raises(BaseException, match="SIGKILL"):
                train.main(arguments(tmp_path, texts, *EXACT))
        else:
            assert train.main(arguments(tmp_path, texts, *EXACT)) == status
    folder = only_run(tmp_path)
    assert checkpoints(folder) == kept
    if status is None:
        (folder / "checkpoint-11").mkdir()  # killed while it wrote
        (folder / "checkpoint-11" / "trainer_state.json").write_text('{"global_st')
    else:
        assert f"{message.format(folder=folder)}, go on with --resume {folder}\n" in capsys.readouterr().err
        assert about(folder)["status"] == ("failed" if status == 1 else "interrupted")
    assert train.main(["--resume", str(folder)]) == 0
    assert_same(folder, whole)


def test_resume_keeps_the_recipe_and_may_add_steps(tmp_path, texts, capsys, monkeypatch):
    """Guards against a run that changes in the middle, a second training of the same steps, and a resumption
    that forgets the new number of steps after Ctrl-C.
    """
    folder = run(tmp_path, texts)
    for flags, message in (
        (["--rotation", "3"], "that run had --rotation 8, this one has 3"),
        (["--batch_size", "2"], "a step of that run has 4 samples, this one's 2: ranks, --batch_size and"),
        (["--num_steps", "11"], "that run had --num_steps 12, this one has 11"),
    ):
        again = arguments(tmp_path, texts, *flags, "--resume", str(folder))
        assert message in refused(train.main, again, capsys)
    seen = []

    def interrupted(self, *_):
        seen.append(self.state.global_step)
        return len(seen) == 6

    before(EarlyExitTrainer, "training_step", raises(KeyboardInterrupt()), interrupted)(monkeypatch)
    assert train.main(["--resume", str(folder), "--num_steps", "20"]) == 130
    assert "step 16 is kept" in capsys.readouterr().err
    more_passes = ["--batch_size", "2", "--gradient_accumulation", "2"]  # as many samples
    assert train.main(["--resume", str(folder), *more_passes]) == 0
    assert seen == [*range(12, 18), *(step for step in range(16, 20) for _ in range(2))]
    assert (about(folder)["status"], about(folder)["arguments"]["num_steps"]) == ("finished", 20)


SHARDS = '"torch.distributed.checkpoint:FileSystemWriter"'
NO_SPACE = 'OSError(28, "No space left on device")'
NOT_WRITTEN = "checkpoint-4: [Errno 28] No space left on device; no checkpoint was written yet"
REFUSED = '"training.run", "load_texts", ValueError("data_path x: no such files")'


@pytest.mark.parametrize(
    ("patch", "parallel", "status", "message"),
    [
        ("at_step(5, SIGTERM, rank=1)", "data", 143, "interrupted; step 6 is kept"),
        (f'at_rank(1, "torch", "save", {NO_SPACE})', "data", 1, NOT_WRITTEN),
        (f'at_rank(1, {SHARDS}, "write_data", {NO_SPACE})', "fsdp", 1, NOT_WRITTEN),
        (f"at_rank(0, {REFUSED})", "data", None, "program.py: error: --data_path x: no such files\n"),
        (f"at_rank(1, {REFUSED})", "data", None, "program.py: error: --data_path x: no such files\n"),
    ],
    ids=["signal", "disk_full", "disk_full_of_a_shard", "refused_by_0", "refused_by_1"],
)  # fmt: skip
def test_an_event_at_one_rank_ends_all(patch, parallel, status, message, tmp_path, texts):
    """Guards against ranks that wait for one another, and that fail with errors of their own."""
    command = arguments(tmp_path, texts, "--batch_size", "2", "--parallel", parallel)
    ended = forks.run_ranks(2, program(tmp_path, patch), *command)
    if status is None:
        assert ended.returncode != 0
        assert ended.stderr == message
    else:
        assert ended.returncode == status, ended.stderr
        assert message in ended.stderr


DROPPING = ["--layer_dropout", "0.7", "--exit_weighting", "equal", "--rotation", "2"]


@pytest.mark.slow
def test_a_sharded_training_resumes_with_other_ranks(tmp_path, texts, model_folder):
    """Guards against shards that only the same number of ranks can read: one of two ranks is killed, four
    ranks resume, with activation checkpointing, and match a run of one process.
    """
    more = [*DROPPING, "--model", str(model_folder), "--exit_loss", "distill"]
    whole = run(tmp_path / "one", texts, *more)
    shared = [*arguments(tmp_path, texts, *more), "--parallel", "fsdp", "--gradient_checkpointing"]
    killed = program(tmp_path, "at_step(10, sends(signal.SIGKILL), rank=1)")
    assert forks.run_ranks(2, killed, *shared, "--batch_size", "2").returncode != 0
    folder = only_run(tmp_path)
    assert (folder / "checkpoint-8" / "pytorch_model_fsdp_0").is_dir()
    wrong = forks.run_ranks(4, ROOT / "train.py", "--resume", folder)
    assert wrong.returncode == 2
    assert "a step of that run has 4 samples, this one's 8: ranks, --batch_size and" in wrong.stderr
    result = forks.run_ranks(4, ROOT / "train.py", "--resume", folder, "--batch_size", "1")
    assert result.returncode == 0, result.stderr
    assert_similar(folder, whole)
    shutil.rmtree(folder / "model")  # killed during the last evaluation
    again = forks.run_ranks(4, ROOT / "train.py", "--resume", folder)
    assert again.returncode == 0, again.stderr
    assert_similar(folder, whole)
    assert forks.run(ROOT / "generate.py", "--model", folder / "model", *GENERATE).returncode == 0


def with_peft(ranks, program, *args):
    """In a new process: transformers looks for peft, which has a folder of its own, at its import."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks] if ranks > 1 else []
    own = {"PYTHONPATH": f"{Path(sys.prefix) / 'lora'}{os.pathsep}{ROOT}"}
    command = [*map(str, [sys.executable, *launcher, program, *args])]
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_adapter_learns_alone(ranks, tmp_path, texts, model_folder):
    """Guards against an adapter that a resumption loses, against checkpoints with the weights of the model,
    and against a merge that changes head, norms or logits.
    """
    more = ["--model", str(model_folder), "--lora_rank", "4", "--exit_loss", "distill"]
    more += ["--num_steps", "20", "--learning_rate", "3e-2", "--log_steps", "4"]
    if ranks > 1:
        more += ["--parallel", "fsdp", "--batch_size", "2"]
    ways = {}
    for name, step in (("whole", 99), ("parts", 10)):
        (tmp_path / name).mkdir()
        killed = program(tmp_path, f"at_step({step}, sends(signal.SIGKILL))")
        result = with_peft(ranks, killed, *arguments(tmp_path / name, texts, *more))
        assert (result.returncode == 0) == (name == "whole"), result.stderr
        ways[name] = only_run(tmp_path / name)
    assert {path.name for path in ways["parts"].glob("checkpoint-8/*model*")} == (
        {"adapter_model.safetensors"} if ranks == 1 else {"pytorch_model_fsdp_0"}
    )
    result = with_peft(ranks, ROOT / "train.py", "--resume", ways["parts"])
    assert result.returncode == 0, result.stderr
    pandas.testing.assert_frame_equal(log(ways["parts"]), log(ways["whole"]), check_exact=ranks == 1)
    assert_learns(log(ways["whole"]), 0.1)
    before, after = AutoModelForCausalLM.from_pretrained(model_folder).state_dict(), weights(ways["parts"])
    changed = {name for name, value in before.items() if not torch.equal(value.bfloat16(), after[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
    adapter = load_file(ways["parts"] / "adapter" / "adapter_model.safetensors")
    for name in changed:
        a, b = (adapter[f"base_model.model.{name.replace('weight', f'lora_{ab}.weight')}"] for ab in "AB")
        assert_close(after[name], before[name] + 2 * b @ a, computed_in=torch.bfloat16, roundings=1)
    config = json.loads((ways["parts"] / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder.resolve())
    if ranks == 1:  # Guards against weights that stay frozen after a merge, and an adapter of an adapter.
        again = arguments(tmp_path, texts, "--model", str(ways["parts"] / "adapter"))
        assert with_peft(1, ROOT / "train.py", *again).returncode == 0
        result = with_peft(1, ROOT / "train.py", *again, "--lora_rank", "2")
        assert result.returncode == 2
        assert "adapter is an adapter, and one on top of it would be of no use" in result.stderr


def test_accumulated_passes_are_one_step(tmp_path):
    """Guards against a mean of means: with padding, two passes of two samples match one of four."""
    rows = [{"prompt": f"what is {i} ", "response": "x" * (1 + 7 * (i % 4)) + str(i)} for i in range(60)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = []
    for name, more in (("one", ()), ("two", ("--batch_size", "2", "--gradient_accumulation", "2"))):
        folder = run(tmp_path / name, str(path), "--layer_dropout", "0", *more)
        curves.append(log(folder)[["step", "loss", "grad_norm"]].dropna())
    pandas.testing.assert_frame_equal(*curves, rtol=1e-4)


def test_continual_pretraining(tmp_path, texts, model_folder):
    """Guards against a model that does not learn or gets another tokenizer, and against activation
    checkpointing that changes the losses.
    """
    curves = []
    for name, more in (("plain", ()), ("checkpointed", ("--gradient_checkpointing",))):
        folder = run(tmp_path / name, texts, "--model", str(model_folder), "--layer_dropout", "0.5", *more)
        curves.append(log(folder))
    pandas.testing.assert_frame_equal(*curves, rtol=1e-4)
    assert_learns(curves[0], 0)
    assert weights(folder).keys() == AutoModelForCausalLM.from_pretrained(model_folder).state_dict().keys()
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (model_folder, folder / "model")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_mixed_precision(tmp_path, texts):
    """Guards against bfloat16 in which nothing is learnt."""
    assert_learns(log(run(tmp_path, texts, "--dtype", "bfloat16", "--curriculum", "gradual")), 0)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path, texts, capsys):
    """Guards against a row of the log that leaves such losses out, which is the trainer's default."""
    assert train.main(arguments(tmp_path, texts, "--learning_rate", "1e30", "--warmup_steps", "0")) == 1
    error = capsys.readouterr().err
    assert re.search(r"\n(a loss|the gradient) is (nan|inf) at step [234], of .*texts\d+/\d+\.py", error)
    assert "begin anew with a lower --learning_rate; no checkpoint was written yet\n" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer_dropout", "1.5"], "--layer_dropout 1.5: must be between 0 and 1"),
        (["--exits", "1", "3"], "--exits [1, 3]: must be between 1 and 2"),
        (["--num_kv_heads", "3"], "--num_kv_heads 3: must divide --num_heads 2"),
        (["--hidden_size", "18"], "--hidden_size 18: must be a multiple of 2 x num_heads"),
        (["--warmup_steps", "12"], "--warmup_steps 12: must be below --num_steps 12"),
        (["--dtype", "float16"], "--dtype float16: mixed precision on a CPU is bfloat16"),
        (["--parallel", "fsdp"], "--parallel fsdp: needs two or more processes; start them by torchrun"),
        (["--quantization", "int8"], "--quantization int8: must be none for training"),
        (["--offload"], "--offload True: is for --parallel fsdp"),
        (["--lora_rank", "2"], "--lora_rank 2: needs a --model to adapt"),
        (["--device", "cuda:1"], "must be auto, cpu, cuda or mps; CUDA_VISIBLE_DEVICES=1 chooses the GPU"),
        (["--streaming"], "--streaming True: is for a dataset of the hub, by --data"),
        (["--output_dir", "/proc"], "--output_dir /proc: cannot be written ("),
        (["--model", "MODEL", "--sequence_length", "257"], "--sequence_length 257: must be at most 256"),
    ],
)
def test_bad_values_are_refused_early(flags, message, tmp_path, model_folder, capsys, monkeypatch):
    """Guards against minutes of reading before an error message."""
    monkeypatch.setattr("training.run.load_texts", lambda *_: pytest.fail("data are read"))
    flags = [str(model_folder) if flag == "MODEL" else flag for flag in flags]
    assert message in refused(train.main, arguments(tmp_path, "no/such/*.txt", *flags), capsys)


def test_an_older_torch_is_refused_at_once(capsys, monkeypatch):
    """Guards against an import error: decoding runs with torch 2.11, training does not."""
    monkeypatch.setattr("train.version", lambda _: "2.12.1+cu130")
    monkeypatch.setitem(sys.modules, "training.run", None)
    assert "torch 2.12.1+cu130: training needs 2.13 or newer" in refused(train.main, [], capsys)


def test_on_a_gpu_auto_is_tf32(tmp_path, monkeypatch):
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


@pytest.fixture
def stream(tmp_path):
    """Flags for a stream of two files that is shorter than the training."""
    (tmp_path / "hub").mkdir()
    for name in ("a", "b"):
        rows = [{"text": f"def {name}{i}(x):\n    return x + {i * i}\n" * 2} for i in range(12)]
        (tmp_path / "hub" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--eval_samples", "2", "--num_steps", "16", "--layer_dropout", "0.5", "--log_steps", "1"]
    return ["--data", str(tmp_path / "hub"), "--streaming", *SMALL, *STEPS, *more]


def test_a_stream_is_read_while_training(tmp_path, stream, monkeypatch):
    """Guards against a stream that ends before the training, and against a resumption that reads other
    samples.
    """
    stream += ["--batch_size", "2", "--gradient_accumulation", "3"]
    assert train.main([*stream, "--output_dir", str(tmp_path / "whole" / "logs")]) == 0
    with monkeypatch.context() as context:
        at_step(5, sends(signal.SIGTERM))(context)
        assert train.main([*stream, "--output_dir", str(tmp_path / "parts" / "logs")]) == 143
    whole, folder = (only_run(tmp_path / name) for name in ("whole", "parts"))
    assert train.main(["--resume", str(folder)]) == 0
    assert_same(folder, whole)
    assert log(whole)["loss"].max() < 7  # no step has twice as many samples


@pytest.mark.parametrize(
    ("parallel", "data"),
    [
        pytest.param("data", "texts", marks=pytest.mark.slow),
        pytest.param("data", "stream", marks=pytest.mark.slow),
        ("fsdp", "texts"),
    ],
)
def test_two_ranks_learn_what_one_does(parallel, data, tmp_path, texts, stream):
    """Guards against drops that depend on the number of ranks, against ranks that read files of their own,
    and against a rank that waits forever since another one skips a layer: at this dropout, all samples of a
    rank often do.
    """
    flags = [*(stream if data == "stream" else arguments(tmp_path, texts)), *DROPPING]
    shared = ["--parallel", parallel, "--batch_size", "1", "--gradient_accumulation", "2"]
    for name, ranks, more in (("one", 1, []), ("two", 2, shared)):
        output = ["--output_dir", tmp_path / name / "logs"]
        result = forks.run_ranks(ranks, ROOT / "train.py", *flags, *more, *output)
        assert result.returncode == 0, result.stderr
    assert_similar(only_run(tmp_path / "two"), only_run(tmp_path / "one"))
