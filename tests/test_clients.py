"""Training loops of others, with TorchOptimizer: Lightning, the HF Trainer, Accelerate, skorch, Ignite, PEFT.

Each trains to what torch's optimiser gives it, resumes from its own checkpoint, logs the rates that the tree has, and
freezes and thaws a subtree in mid-run. Run by `pytest -m nightly`, with `pip install fluxpy[clients]`; what is not
installed is skipped. Nothing is downloaded.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import fluxpy
from fluxpy import AdamW, ClipGlobalNorm, OptimiserChain
from fluxpy.interop import TorchOptimizer

# The clients' own warnings are theirs; what fluxpy warns of is an error here too.
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore", "error:param_groups"),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "LITLOGGER_DISABLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    here = os.getcwd()
    os.chdir(tmp_path)  # what they leave lying about
    yield
    os.chdir(here)


class Net(nn.Module):
    """An encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


torch.manual_seed(5)
X = torch.randn(64, 4)
Y = X.sum(1, keepdim=True).sin()
LOADER = DataLoader(TensorDataset(X, Y), batch_size=8)  # 8 batches, in order

RULES = {"*encoder.*": AdamW(1e-2), "*": AdamW(3e-2)}


# Rules with weights to evaluate with.
AVERAGING = [
    fluxpy.Averaged(AdamW(1e-2), decay=0.8),
    fluxpy.ScheduleFreeAdamW(1e-2),
]


def theirs(model: Any) -> torch.optim.Optimizer:
    """The twin of `RULES` in torch."""
    encoder = [x for name, x in model.named_parameters() if "encoder." in name]
    head = [x for name, x in model.named_parameters() if "encoder." not in name]
    return torch.optim.AdamW([{"params": encoder, "lr": 1e-2}, {"params": head, "lr": 3e-2}])


def ours(model: Any) -> TorchOptimizer:
    return TorchOptimizer(RULES, model)


def rates(optimizer: Any) -> list[float]:
    """The rate of each group, as the tree has it."""
    tree = optimizer.tree
    return [fluxpy.value(tree[group["names"][0]], "lr") for group in optimizer.param_groups]


def assert_same(one: nn.Module, other: nn.Module, atol: float = 2e-6) -> None:
    """To the roundings of float32, and after a run that moved every parameter."""
    for (path, x), y in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(x, y[1], rtol=0, atol=atol), path


def assert_trained(model: nn.Module, start: nn.Module) -> None:
    for (path, x), y in zip(model.named_parameters(), start.parameters(), strict=True):
        assert (x - y).abs().max() > 1e-3, path


# --- Lightning ----------------------------------------------------------------------------------------------------


def lightning_module(make: Callable[[Any], torch.optim.Optimizer]) -> Any:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = mse_loss(self.net(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = make(self)
            schedule = lr_scheduler.OneCycleLR(optimizer, [0.05, 0.1], total_steps=24)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def lightning_trainer(folder: Path, callbacks: list[Any], epochs: int = 3, **options: Any) -> Any:
    import lightning as L

    return L.Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", logger=options.pop("logger", False),
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.5, callbacks=callbacks, **options,
    )  # fmt: skip


def test_lightning(tmp_path: Path) -> None:
    L = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    modules = {}
    for name, make in (("ours", ours), ("theirs", theirs)):
        modules[name] = lightning_module(make)
        keep = ModelCheckpoint(tmp_path / name, save_top_k=-1, filename="{epoch}")
        monitor = LearningRateMonitor("step", log_momentum=True)
        logger = CSVLogger(tmp_path / "logs", name=name)
        lightning_trainer(tmp_path, [keep, monitor], logger=logger, log_every_n_steps=1).fit(modules[name], LOADER)
    assert_same(modules["ours"].net, modules["theirs"].net)
    assert_trained(modules["ours"].net, Net())
    logs = [next((tmp_path / "logs" / name).rglob("metrics.csv")).read_text() for name in modules]
    assert logs[0].count("\n") > 24 and "lr-TorchOptimizer/pg2-momentum" in logs[0]
    again = lightning_module(ours)

    class Last(L.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            assert rates(trainer.optimizers[0]) == [group["lr"] for group in trainer.optimizers[0].param_groups]
            assert module.optimizers().param_groups[0]["lr"] == rates(trainer.optimizers[0])[0]
            assert trainer.optimizers[0].tree.net.head.bias.count == trainer.global_step >= 8

    lightning_trainer(tmp_path, [Last()]).fit(again, LOADER, ckpt_path=tmp_path / "ours" / "epoch=0.ckpt")
    assert_same(again.net, modules["ours"].net, atol=0)


def test_lightning_freezes_and_thaws(tmp_path: Path) -> None:
    L = pytest.importorskip("lightning")
    seen = []

    class Plan(L.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            seen.append(copy.deepcopy(module.net.encoder))
            encoder = trainer.optimizers[0].tree.net.encoder
            fluxpy.freeze(encoder) if trainer.current_epoch == 1 else fluxpy.thaw(encoder)

    module = lightning_module(ours)
    lightning_trainer(tmp_path, [Plan()], enable_checkpointing=False).fit(module, LOADER)
    assert_same(seen[1], seen[2], atol=0)
    assert_trained(seen[1], seen[0])
    assert_trained(module.net.encoder, seen[2])


@pytest.mark.parametrize("rule", AVERAGING, ids=["Averaged", "ScheduleFree"])
@pytest.mark.parametrize("after", ["validation", "training"])
def test_lightning_validates_with_the_weights_for_it(tmp_path: Path, rule: Any, after: str) -> None:
    """By hooks of the module; and goes on from files that were written in either mode."""
    L = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    seen: list[tuple[float, float]] = []

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return mse_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append((mse_loss(self.net(batch[0]), batch[1]).item(), self.trainer.global_step))

        def on_validation_model_eval(self) -> None:
            super().on_validation_model_eval()
            for optimizer in self.trainer.optimizers:
                optimizer.eval()

        def on_validation_model_train(self) -> None:
            super().on_validation_model_train()
            self.on_train_start()

        def on_train_start(self) -> None:  # after a file that was written in validation
            for optimizer in self.trainer.optimizers:
                optimizer.train()

        def configure_optimizers(self) -> Any:
            return TorchOptimizer(rule, self)

    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=after == "training")
    first = Module()
    lightning_trainer(tmp_path, [keep], epochs=4).fit(first, LOADER, LOADER)
    wanted = dict.fromkeys(step for _, step in seen)
    assert len(wanted) == 5  # also before the first step
    start, losses = fluxpy.setup(rule, net := Net()), []
    for _ in range(4):
        for batch in LOADER:
            grads = fluxpy.gradient(lambda m, x, y: mse_loss(m(x), y), net, *batch, state=start)
            norm = torch.stack([g.norm() for _, g in fluxpy.trainables(grads, path=True)]).norm()
            fluxpy.update(start, net, fluxpy.tree_map(lambda g, n=norm: g * (0.5 / (n + 1e-6)).clamp(max=1), grads))
        with fluxpy.averaged(start, net), torch.no_grad():
            losses += [mse_loss(net(x), y).item() for x, y in LOADER]
    found = [loss for loss, step in seen if step > 0]
    assert len(found) == len(losses) and torch.allclose(torch.tensor(found), torch.tensor(losses), atol=1e-5)
    again = Module()
    lightning_trainer(tmp_path, [], epochs=4).fit(again, LOADER, LOADER, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same(again.net, first.net, atol=0)


def test_lightning_by_hand(tmp_path: Path) -> None:
    """Manual optimisation, with an optimiser for each branch of one tree."""
    L = pytest.importorskip("lightning")

    class Module(L.LightningModule):
        def __init__(self, two: Callable[[Any], list[Any]]) -> None:
            super().__init__()
            self.net, self.automatic_optimization, self.two = Net(), False, two

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()[batch_idx % 2]  # pyright: ignore[reportIndexIssue]
            x, y = batch
            optimizer.zero_grad()
            with optimizer.toggle_model():
                self.manual_backward(mse_loss(self.net(x), y))
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return self.two(self.net)

    def branches(net: Any) -> list[Any]:
        state = fluxpy.setup(AdamW(1e-2), net)
        return [TorchOptimizer(state[name], getattr(net, name)) for name in ("encoder", "head")]

    def twins(net: Any) -> list[Any]:
        return [torch.optim.AdamW(getattr(net, name).parameters(), 1e-2) for name in ("encoder", "head")]

    modules = [Module(branches), Module(twins)]
    for module in modules:
        trainer = L.Trainer(
            default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, LOADER)
    assert_same(modules[0].net, modules[1].net)
    assert_trained(modules[0].net, Net())


# --- The HF Trainer -----------------------------------------------------------------------------------------------


class Items(torch.utils.data.Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(0, 30, (64, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "labels": self.ids[i].sum() % 2}


def tiny_bert(dropout: float = 0.1) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, num_labels=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def hf_trainer(folder: Path, make: Callable[[Any], Any], callbacks: list[Any] | None = None, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    model = tiny_bert(options.pop("dropout", 0.1))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        max_grad_norm=0.5, warmup_steps=3, lr_scheduler_type="cosine", logging_steps=1, save_steps=6, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=11, **options,
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=Items(), eval_dataset=Items(), optimizers=(make(model), None),
        callbacks=callbacks,
    )  # fmt: skip


def decayed(model: Any) -> torch.optim.Optimizer:
    """The groups that the Trainer itself makes: no decay on biases and norms."""
    plain = [x for name, x in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
    others = [x for name, x in model.named_parameters() if not (name.endswith("bias") or "LayerNorm" in name)]
    return torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2
    )  # fmt: skip


DECAYED = {"*bias": AdamW(1e-2, weight_decay=0.0), "*LayerNorm*": AdamW(1e-2, weight_decay=0.0),
           "*": AdamW(1e-2, weight_decay=0.1)}  # fmt: skip


def test_hf_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    one = hf_trainer(tmp_path / "ours", lambda model: TorchOptimizer(DECAYED, model))
    loss = one.train().training_loss
    other = hf_trainer(tmp_path / "theirs", decayed)  # which sets the seed of Dropout again
    expected = other.train().training_loss
    assert math.isclose(loss, expected, rel_tol=1e-5)
    assert_same(one.model, other.model, atol=1e-5)
    logs = [[row["learning_rate"] for row in t.state.log_history if "learning_rate" in row] for t in (one, other)]
    assert logs[0] == logs[1] and len(set(logs[0])) > 8
    tree = one.optimizer.optimizer.tree
    assert fluxpy.value(tree.classifier.weight, "lr") == one.optimizer.param_groups[0]["lr"]
    assert tree.classifier.weight.count == 12
    again = hf_trainer(tmp_path / "again", lambda model: TorchOptimizer(DECAYED, model))
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-6"))
    assert_same(again.model, one.model, atol=0)


def test_hf_trainer_with_a_schedule_in_the_rule(tmp_path: Path) -> None:
    """The Trainer wants a scheduler: it gets one that changes nothing."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, cosine = tiny_bert(), fluxpy.schedules.cosine(1e-2, 0.0, 8)
    optimizer = TorchOptimizer(AdamW(cosine), model)
    idle = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1
    )
    trainer = Trainer(model, arguments, train_dataset=Items(), optimizers=(optimizer, idle))
    trainer.train()
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert optimizer.tree.classifier.bias.rule.lr == cosine
    assert logged == [cosine(i) for i in range(1, 9)] or logged == [cosine(i) for i in range(8)]


def test_hf_trainer_freezes_and_thaws(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformers import TrainerCallback

    seen = {}

    class Plan(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            seen[state.global_step] = copy.deepcopy(given["model"].bert)
            tree = given["optimizer"].optimizer.tree
            if state.global_step == 4:
                fluxpy.freeze(tree.bert.encoder)
            if state.global_step == 8:
                fluxpy.thaw(tree.bert.encoder)

    trainer = hf_trainer(tmp_path, lambda model: TorchOptimizer(DECAYED, model), [Plan()])
    trainer.train()
    assert_same(seen[4].encoder, seen[8].encoder, atol=0)
    assert not torch.equal(seen[4].embeddings.word_embeddings.weight, seen[8].embeddings.word_embeddings.weight)
    tree = trainer.optimizer.optimizer.tree
    assert (tree.bert.encoder.layer[0].output.dense.weight.count, tree.classifier.bias.count) == (8, 12)


@pytest.mark.parametrize("rule", AVERAGING, ids=["Averaged", "ScheduleFree"])
def test_hf_trainer_evaluates_with_the_weights_for_it(tmp_path: Path, rule: Any) -> None:
    """It calls `eval` and `train` by itself; and saves after it has evaluated."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 64}
    options["dropout"] = 0.0  # evaluations draw random numbers too

    def make(model: Any) -> TorchOptimizer:
        return TorchOptimizer(rule, model)

    one = hf_trainer(tmp_path / "one", make, **options)
    one.train()
    logged = [row["eval_loss"] for row in one.state.log_history if "eval_loss" in row]
    other = hf_trainer(tmp_path / "other", make, dropout=0.0)  # never evaluates
    other.train()
    tree, batch = other.optimizer.optimizer.tree, torch.utils.data.default_collate([*Items()])

    def evaluated() -> float:
        with torch.no_grad():
            return other.model.eval()(**batch).loss.item()

    plain = evaluated()
    with fluxpy.averaged(tree, other.model):
        assert math.isclose(logged[-1], evaluated(), rel_tol=1e-5) and not math.isclose(logged[-1], plain, rel_tol=1e-4)
        assert_same(one.model, other.model, atol=1e-6)  # it ends in evaluation mode, with the weights to keep
    one.optimizer.train()
    assert_same(one.model, other.model, atol=1e-6)
    again = hf_trainer(tmp_path / "again", make, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-6"))
    again.optimizer.train()
    assert_same(again.model, one.model, atol=0)


# --- Accelerate ---------------------------------------------------------------------------------------------------


def accelerated(make: Callable[[Any], Any], folder: Path, *, resume: bool = False, plan: Any = None) -> Any:
    """Three epochs, an update every second batch; saved after the sixth update."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Net()
    optimizer = make(model)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 12)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, LOADER, scheduler)
    first = 0
    if resume:
        accelerator.load_state(str(folder))
        first = 12
    batches = [batch for _ in range(3) for batch in loader]
    for i, (x, y) in enumerate(batches[first:], start=first):
        if plan is not None:
            plan(i, optimizer.optimizer.tree, model)
        with accelerator.accumulate(model):
            accelerator.backward(mse_loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if i == 11 and not resume:
            accelerator.save_state(str(folder))
    return model, optimizer


def test_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, optimizer = accelerated(ours, tmp_path / "ours")
    twin, other = accelerated(theirs, tmp_path / "theirs")
    assert_same(model, twin)
    assert_trained(model, Net())
    assert rates(optimizer.optimizer) == [group["lr"] for group in other.param_groups]
    assert optimizer.optimizer.tree.head.bias.count == 12
    again, _ = accelerated(ours, tmp_path / "ours", resume=True)
    assert_same(again, model, atol=0)


def test_accelerate_freezes_and_thaws(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    seen = {}

    def plan(i: int, tree: Any, model: nn.Module) -> None:
        seen[i] = copy.deepcopy(model.encoder)
        if i in (8, 16):
            (fluxpy.freeze if i == 8 else fluxpy.thaw)(tree.encoder)

    model, _ = accelerated(ours, tmp_path, plan=plan)
    assert_same(seen[8], seen[16], atol=0)  # pyright: ignore[reportArgumentType]
    assert_trained(model.encoder, seen[16])  # pyright: ignore[reportArgumentType]


def test_accelerate_passes_the_mode_on(tmp_path: Path) -> None:
    """And goes on from what it saved in evaluation mode."""
    accelerate = pytest.importorskip("accelerate")

    def prepared() -> Any:
        accelerator, model = accelerate.Accelerator(cpu=True), Net()
        return accelerator, *accelerator.prepare(model, TorchOptimizer(AVERAGING[0], model))

    def trained(model: Any, optimizer: Any) -> None:
        for x, y in LOADER:
            mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    accelerator, model, optimizer = prepared()
    trained(model, optimizer)
    before = copy.deepcopy(model)
    optimizer.eval()
    assert torch.equal(model.head.weight, optimizer.optimizer.tree.head.weight.state.x)
    assert not torch.equal(model.head.weight, before.head.weight)
    accelerator.save_state(str(tmp_path / "saved"))
    optimizer.train()
    assert_same(model, before, atol=0)
    trained(model, optimizer)
    accelerator, other, again = prepared()
    accelerator.load_state(str(tmp_path / "saved"))
    again.train()
    assert_same(other, before, atol=0)
    trained(other, again)
    assert_same(other, model, atol=0)


# --- skorch -------------------------------------------------------------------------------------------------------


def skorch_net(make: Callable[[Any], Any], **options: Any) -> Any:
    import skorch

    class Regressor(skorch.NeuralNetRegressor):
        def initialize_optimizer(self, triggered_directly: bool | None = None) -> Any:
            self.optimizer_ = make(self.module_)
            return self

    callbacks = options.pop("callbacks", [])
    if options.pop("schedule", True):
        callbacks = [("schedule", skorch.callbacks.LRScheduler("ExponentialLR", gamma=0.8)), *callbacks]
    return Regressor(
        Net, max_epochs=options.pop("max_epochs", 3), batch_size=8, train_split=None, verbose=0,
        callbacks=callbacks, **options,
    )  # fmt: skip


def test_skorch(tmp_path: Path) -> None:
    pytest.importorskip("skorch")
    from skorch.callbacks import Checkpoint, LoadInitState

    net = skorch_net(ours).fit(X, Y)
    twin = skorch_net(theirs).fit(X, Y)
    assert_same(net.module_, twin.module_)
    assert_trained(net.module_, Net())
    assert net.history[:, "event_lr"] == twin.history[:, "event_lr"]
    assert rates(net.optimizer_) == [group["lr"] for group in twin.optimizer_.param_groups]

    keep = Checkpoint(monitor=None, dirname=str(tmp_path))
    # Without its LRScheduler, which a checkpoint of skorch does not hold.
    whole = skorch_net(ours, schedule=False).fit(X, Y)
    skorch_net(ours, schedule=False, callbacks=[("keep", keep)], max_epochs=1).fit(X, Y)
    load = LoadInitState(keep)
    again = skorch_net(ours, schedule=False, callbacks=[("load", load)], max_epochs=2).fit(X, Y)
    assert again.optimizer_.tree.head.bias.count == 24
    assert_same(again.module_, whole.module_, atol=0)


def test_skorch_freezes_and_thaws() -> None:
    skorch = pytest.importorskip("skorch")
    seen = []

    class Plan(skorch.callbacks.Callback):
        def on_epoch_begin(self, net: Any, **given: Any) -> None:
            seen.append(copy.deepcopy(net.module_.encoder))
            encoder = net.optimizer_.tree.encoder
            fluxpy.freeze(encoder) if len(seen) == 2 else fluxpy.thaw(encoder)

    net = skorch_net(ours, callbacks=[("plan", Plan())]).fit(X, Y)
    assert_same(seen[1], seen[2], atol=0)
    assert_trained(net.module_.encoder, seen[2])


# --- Ignite -------------------------------------------------------------------------------------------------------


def ignited(
    make: Callable[[Any], Any], folder: Path, resume: bool = False, plan: Callable[..., None] | None = None
) -> tuple[nn.Module, Any, list[float]]:
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.handlers.param_scheduler import CosineAnnealingScheduler

    model = Net()
    optimizer = make(model)
    trainer = create_supervised_trainer(model, optimizer, mse_loss)
    schedule = CosineAnnealingScheduler(optimizer, "lr", 0.05, 0.001, 48, param_group_index=0)
    trainer.add_event_handler(Events.ITERATION_STARTED, schedule)
    logged: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: logged.append(optimizer.param_groups[0]["lr"]))
    parts = {"trainer": trainer, "model": model, "optimizer": optimizer, "schedule": schedule}
    saver = DiskSaver(str(folder), require_empty=False)
    if plan is not None:
        trainer.add_event_handler(Events.EPOCH_STARTED, plan, optimizer, model)
    if resume:
        [file] = folder.glob("*checkpoint_8.pt")
        Checkpoint.load_objects(parts, torch.load(file, weights_only=True))
    else:
        keep = Checkpoint(parts, saver, n_saved=None)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, keep)
    trainer.run(LOADER, max_epochs=3)
    return model, optimizer, logged


def test_ignite(tmp_path: Path) -> None:
    pytest.importorskip("ignite")
    model, optimizer, logged = ignited(ours, tmp_path / "ours")
    twin, _, expected = ignited(theirs, tmp_path / "theirs")
    assert_same(model, twin)
    assert_trained(model, Net())
    assert logged == expected and rates(optimizer)[0] == logged[-1]
    again, _, _ = ignited(ours, tmp_path / "ours", resume=True)
    assert_same(again, model, atol=0)


def test_ignite_freezes_and_thaws(tmp_path: Path) -> None:
    pytest.importorskip("ignite")
    seen = []

    def plan(trainer: Any, optimizer: Any, model: Any) -> None:
        seen.append(copy.deepcopy(model.encoder))
        (fluxpy.freeze if len(seen) == 2 else fluxpy.thaw)(optimizer.tree.encoder)

    model, _, _ = ignited(ours, tmp_path, plan=plan)
    assert_same(seen[1], seen[2], atol=0)
    assert_trained(model.encoder, seen[2])  # pyright: ignore[reportArgumentType]


# --- PEFT ---------------------------------------------------------------------------------------------------------


def test_peft_trains_the_adapters_alone() -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")

    def adapted() -> Any:
        return peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=2, target_modules=["query", "value"], lora_alpha=4))

    torch.manual_seed(2)
    model = adapted().eval()
    twin = copy.deepcopy(model)
    rule = OptimiserChain(ClipGlobalNorm(0.5), AdamW(1e-2))
    optimizer = TorchOptimizer(rule, model)
    other = torch.optim.AdamW([x for x in twin.parameters() if x.requires_grad], 1e-2)
    batch = torch.utils.data.default_collate([Items()[i] for i in range(8)])
    for _ in range(4):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            m(**batch).loss.backward()
            if m is twin:
                nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            o.step()
    assert_same(model, twin, atol=1e-5)
    trained = [path for path, leaf in fluxpy.leaves(optimizer.tree) if leaf.count]
    assert trained and all("lora_" in path for path in trained)
    assert all(leaf.state is None for _, leaf in fluxpy.leaves(optimizer.tree) if leaf.frozen)
