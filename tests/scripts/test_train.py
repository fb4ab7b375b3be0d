"""train.py as users run it, on models of a few thousand parameters."""

import errno
import gc
import os
import re
import signal
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from unittest.mock import Mock

import pandas
import pytest
import torch
from helpers import SMALL_TRAINING, Killed, about, only_run, refused, watch, write_program
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import generate
import train
from runs.failures import Failed
from self_speculation import load_model_and_tokenizer
from training.run import _replaced
from training.trainer import EarlyExitTrainer

STEPS = ["--num_steps", "12", "--eval_steps", "6", "--save_steps", "4"]
DRAFTS = ["--generation_strategy", "self_speculative", "--exit_layer", 1, "--num_speculations", 3]
GENERATE = ["--prompt", "def", "--max_steps", 8, "--sample", "False", *DRAFTS]


def arguments(tmp_path, texts, *more):
    more += ("--model_args", "") * ("--model" in more)  # SMALL_TRAINING has the shape of a new one
    return ["--data_path", texts, "--output_dir", str(tmp_path / "logs"), *SMALL_TRAINING, *STEPS, *more]


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
    """Every logged number and every weight, to the last bit, in the same columns."""
    mine, theirs = (pandas.read_csv(each / "log.csv", nrows=0) for each in (folder, other))
    assert [*mine] == [*theirs]
    pandas.testing.assert_frame_equal(log(folder), log(other), check_exact=True)
    mine = weights(folder)
    theirs = weights(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def assert_similar(folder, other):
    """Losses, gradients and final weights, up to the order of sums."""
    for columns in (["step", "loss", "grad_norm"], ["step", "eval_loss"]):
        left, right = (log(each)[columns].dropna() for each in (folder, other))
        pandas.testing.assert_frame_equal(left, right, rtol=1e-3)
    mine = weights(folder)
    for name, value in weights(other).items():
        # Saved in bfloat16. The sign of a gradient near 0 is chance, and AdamW steps by the sign.
        assert (mine[name] - value).norm() < 0.02 * value.norm(), name


def run(tmp_path, texts, *more):
    assert train.main(arguments(tmp_path, texts, *more)) == 0
    return only_run(tmp_path)


def checkpoints(folder):
    return {int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")}


def program(tmp_path, patch):
    """train.py with a patch by the functions below, for separate processes."""
    code = f"from test_train import *\n{patch}(pytest.MonkeyPatch())\n"
    return write_program(tmp_path, f"{code}from runs import program; program.run(train.main)\n")


def test_from_scratch_to_a_folder_for_every_script(tmp_path, texts, capsys):
    """Guards against a training that learns nothing, and results that no script or transformers reads."""
    folder = run(tmp_path, texts, "--num_steps", "40", "--eval_steps", "40", "--save_steps", "40")
    assert "\nexit 1 never learns: its weight in the paper's loss is 0; --exit" in capsys.readouterr().out
    assert_learns(log(folder), 0.5)
    assert {f"eval_loss_exit_{exit}" for exit in (1, 2, 3)} <= set(log(folder))
    assert list(pandas.read_csv(folder / "exits.csv")["exit_layer"]) == [1, 2, 3]
    assert about(folder)["status"] == "finished"
    model, tokenizer = load_model_and_tokenizer(str(folder / "model"))
    first = "def add(a, b):\n"
    second = "        return a + 12\n"
    ids = tokenizer.encode(first + second)
    assert tokenizer.decode(ids) == first + second
    # A prompt may end in a line break, so it must not merge with the indentation after it.
    assert ids == tokenizer.encode(first) + tokenizer.encode(second)
    # If the end of a text were padding, too, the embedding of the end would stay zero.
    assert model.get_input_embeddings().weight[tokenizer.eos_token_id].abs().sum() > 0
    assert generate.main([*map(str, ["--model", folder / "model", *GENERATE])]) == 0


NOTHING = ["--learning_rate", "1e-12"]
# The first step multiplies weights by 1 - 1e-6 * 1e6 = 0: logits are equal, and the loss is that of chance.
FORGET = ["--learning_rate", "1e-6", "--weight_decay", "1e6", "--warmup_steps", "0"]


@pytest.mark.parametrize(("more", "why"), [
    (NOTHING, "predictions are hardly better than frequencies of tokens"), (FORGET, "loss rose"),
])  # fmt: skip
def test_a_model_whose_exits_agree_on_nothing_is_named(more, why, tmp_path, texts, capsys):
    """Guards against an agreement of 1.000 that is read as success: all layers may predict one token."""
    if more == FORGET:
        steps = ["--num_steps", "40", "--eval_steps", "40", "--save_steps", "40"]
        more = [*more, "--model", str(run(tmp_path / "before", texts, *steps) / "model")]
    folder = run(tmp_path, texts, "--exit_loss", "distill", *more)
    printed = capsys.readouterr().out
    assert f"warning: the last layer's {why}; agreement then says\nlittle, see docs/training.md" in printed
    assert "perplexity" in printed
    assert log(folder)["step"].iloc[0] == 0  # what the loss is compared with
    assert pandas.read_csv(folder / "exits.csv")["entropy"].iloc[-1] == 1


def test_all_tables_are_of_the_same_samples_and_the_first_line_says_their_time(
    tmp_path, texts, capsys, monkeypatch
):
    """Guards against a last evaluation that takes longer than the training, without a word about it before,
    and against numbers of other samples in the table of exits than in the log.
    """
    monkeypatch.setattr("training.run.perf_counter", count().__next__)  # a batch takes a second
    batches = watch(monkeypatch, EarlyExitTrainer, "prediction_step")
    folder = run(tmp_path, texts, "--eval_steps", "4", "--eval_samples", "6")
    first, *_ = capsys.readouterr().out.splitlines()
    # At steps 0, 4, 8 and 12, in batches of 4 and 2.
    assert "; losses of 6 held-out samples are computed 4 times, which takes about 8 s; " in first
    assert len(batches) == 5 + 8
    evaluated = pandas.read_csv(folder / "log.csv").dropna(subset="eval_loss")
    assert [*evaluated["step"]] == [0, 4, 8, 12]
    scores = pandas.read_csv(folder / "exits.csv")
    assert [evaluated[f"eval_loss_exit_{exit}"].iloc[-1] for exit in scores["exit_layer"]] == [
        *scores["loss"]
    ]


def test_the_saved_model_has_the_scores(tmp_path, texts):
    """Guards against scores of weights that are rounded afterwards."""
    folder = run(tmp_path, texts)
    again = ["--model", str(folder / "model"), "--num_steps", "1", "--warmup_steps", "0"]
    other = run(tmp_path / "again", texts, *again, "--learning_rate", "1e-12")
    left, right = (pandas.read_csv(each / "exits.csv") for each in (folder, other))
    pandas.testing.assert_frame_equal(left, right, rtol=1e-5)


def test_each_step_leaves_processors_to_other_programs(tmp_path, texts, monkeypatch):
    """Guards against a training whose threads wait for each other while other programs use the processors."""
    governor = Mock()
    monkeypatch.setattr("training.run.set_threads", lambda number: governor)
    run(tmp_path, texts)
    assert governor.adjust.call_count >= 12


def raises(error):
    return Mock(side_effect=error)


def sends(number):
    return lambda: os.kill(os.getpid(), number)


def before(owner, name, event, when):
    """A patch: call `event` before the calls of a function whose arguments meet a condition."""
    return lambda monkeypatch: watch(monkeypatch, owner, name, lambda *args, **_: when(*args) and event())


def at_step(step, event, rank=0):
    """A patch: call `event` when a rank begins the step after this one."""
    place = step, rank
    return before(
        EarlyExitTrainer, "training_step", event,
        lambda trainer, *_: (trainer.state.global_step, trainer.args.process_index) == place,
    )  # fmt: skip


def at_rank(rank, owner, name, error):
    """A patch: a function raises an error at one rank."""
    return before(resolve_name(owner), name, raises(error), lambda *_: os.environ["RANK"] == str(rank))


def in_last_checkpoint(event):
    """A patch: call `event` when `torch.save` writes the last of three checkpoints."""
    return before(torch, "save", event, lambda _, path, *__: "checkpoint-12" in str(path))


SIGINT = sends(signal.SIGINT)
SIGTERM = sends(signal.SIGTERM)
EXACT = ["--layer_dropout", "0.5", "--exit_loss", "distill"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, texts):
    """An uninterrupted training."""
    return run(tmp_path_factory.mktemp("whole"), texts, *EXACT)


def full_disk():
    return OSError(errno.ENOSPC, "No space left on device")


def by_the_model(_, folder, *__):
    """Whether a tokenizer is saved beside the model, whose weights are there already."""
    return Path(folder).name.startswith("model")


NO_ROOM = "[enforce fail at inline_container.cc:672]"
INTERRUPTIONS = {  # an event, exit status, steps of the checkpoints that are left, the message
    "kill": (at_step(5, raises(Killed)), None, {4}, ""),
    "checkpoint": (in_last_checkpoint(SIGTERM), 143, {8, 12}, "interrupted; step 12"),
    "evaluation": (
        before(EarlyExitTrainer, "evaluate", SIGINT, lambda trainer, *_: trainer.state.global_step == 12),
        130, {8, 12}, "interrupted; step 12",
    ),
    "disk full": (
        in_last_checkpoint(raises(RuntimeError(NO_ROOM))), 1, {4, 8},
        f"cannot write {{folder}}/checkpoint-12: {NO_ROOM}; step 8",
    ),
    "disk full at the end": (
        before(PreTrainedTokenizerBase, "save_pretrained", raises(full_disk()), by_the_model), 1, {8, 12},
        f"cannot write {{folder}}/model: {full_disk()}; step 12",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_run_keeps_its_checkpoints_and_continues(
    name, tmp_path, texts, whole, capsys, monkeypatch
):
    """Guards against a lost checkpoint or signal, and a resumption that learns something else by a bit."""
    patch, status, kept, message = INTERRUPTIONS[name]
    ended = None
    with monkeypatch.context() as context, suppress(Killed):
        patch(context)
        ended = train.main(arguments(tmp_path, texts, *EXACT))
    folder = only_run(tmp_path)
    assert (ended, checkpoints(folder)) == (status, kept)
    is_saved = name == "evaluation"  # it comes last
    assert [path.name for path in folder.glob("model*")] == ["model"] * is_saved
    if status is None:
        (folder / "checkpoint-11").mkdir()  # killed while it wrote
        (folder / "checkpoint-11" / "trainer_state.json").write_text('{"global_st')
    else:
        printed = f"{re.escape(message.format(folder=folder))} is kept, go on with .* --resume {folder}\n"
        assert re.search(printed, capsys.readouterr().err)
        assert about(folder)["status"] == ("failed" if status == 1 else "interrupted")
    assert train.main(["--resume", str(folder), "--gradient_checkpointing"]) == 0
    assert_same(folder, whole)


def test_resume_keeps_the_recipe_and_may_add_steps(tmp_path, texts, capsys, monkeypatch):
    """Guards against a run that changes in the middle, a new number of steps that is forgotten, and an empty
    file of records.
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
    interrupt = raises(KeyboardInterrupt())

    def sixth(self, *_):
        seen.append(self.state.global_step)
        return len(seen) == 6

    before(EarlyExitTrainer, "training_step", interrupt, sixth)(monkeypatch)
    assert train.main(["--resume", str(folder), "--num_steps", "20"]) == 130
    assert "step 16 is kept" in capsys.readouterr().err
    more_passes = ["--batch_size", "2", "--gradient_accumulation", "2"]  # as many samples
    assert train.main(["--resume", str(folder), *more_passes]) == 0
    assert seen == [*range(12, 18), *(step for step in range(16, 20) for _ in range(2))]
    assert (about(folder)["status"], about(folder)["arguments"]["num_steps"]) == ("finished", 20)
    assert not (folder / "records.jsonl").exists()


def test_a_model_stays_until_the_next_one_is_whole(tmp_path):
    """Guards against a model that a longer training overwrites, and then cannot write."""
    folder = tmp_path / "model"

    def write(text, error=None):
        with _replaced(folder) as partial:
            partial.mkdir()
            (partial / "weights").write_text(text)
            if error is not None:
                raise error

    write("first")
    for error, seen in ((full_disk(), Failed), (Killed(), Killed)):
        with pytest.raises(seen):
            write("second", error)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert (folder / "weights").read_text() == "first"
    (tmp_path / "model.partial").mkdir()  # of a process that was killed
    write("second")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "weights").read_text() == "second"


def test_continual_pretraining(tmp_path, texts, model_folder):
    """Guards against a model that does not learn in 16 bits, or gets another tokenizer."""
    flags = ["--model", str(model_folder), "--dtype", "bfloat16", "--curriculum", "gradual"]
    folder = run(tmp_path, texts, *flags)
    assert_learns(log(folder), 0)
    assert weights(folder).keys() == AutoModelForCausalLM.from_pretrained(model_folder).state_dict().keys()
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (model_folder, folder / "model")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path, texts, capsys):
    """Guards against a row of the log that leaves such losses out, which is the trainer's default."""
    assert train.main(arguments(tmp_path, texts, "--learning_rate", "1e30", "--warmup_steps", "0")) == 1
    message = r"\nloss or gradient is not finite at step [234]: begin anew with a lower learning rate; no "
    assert re.search(message, capsys.readouterr().err)


def test_garbage_is_collected_while_a_model_learns(tmp_path, texts, monkeypatch):
    """Guards against memory that grows with each step: a script begins without Python's collector."""
    is_enabled = []
    at_step(1, lambda: is_enabled.append(gc.isenabled()))(monkeypatch)
    gc.disable()
    try:
        run(tmp_path, texts, "--num_steps", "4")
    finally:
        gc.unfreeze()
        gc.enable()
    assert is_enabled == [True]


def test_an_older_torch_is_refused_at_once(capsys, monkeypatch):
    """Guards against an import error: decoding runs with torch 2.11, training does not."""
    monkeypatch.setattr("train.version", lambda _: "2.12.1+cu130")
    monkeypatch.setitem(sys.modules, "training.run", None)
    assert "torch 2.12.1+cu130: training needs 2.13 or newer" in refused(train.main, [], capsys)


def test_ctrl_c_before_the_first_step_leaves_no_folder(tmp_path, texts, monkeypatch):
    """Guards against the folder of a run that has nothing to go on with."""
    monkeypatch.setattr("training.run.to_blocks", raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments(tmp_path, texts))
    assert not list(tmp_path.glob("logs/*"))
