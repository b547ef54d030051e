"""Names, order and defaults of arguments, as users write against them: another default is a silent change."""

import inspect
from typing import Any

import pytest
import torch

import fluxpy
from fluxpy import interop, learner, surgery

CALLS = """
setup(rule, model, *, compile=False, keep=None)
gradient(f, model, *args, state=None, create_graph=False)
withgradient(f, model, *args, state=None, create_graph=False)
update(state, model, grads=None, *, inplace=True)
adjust(state, lr=None, /, *, member=None, **hyperparameters)
freeze(state)
thaw(state, *, count=None)
reset(state)
train(loss, model, data, state, *, progress=None, release=False)
trainstep(loss, model, batch, state, *, release=False)
summary(state, depth=None)
select(state, *what)
module_paths(model, *types)
value(leaf, name)
trainables(model, path=False)
destructure(model)
DataLoader(data, batch_size=32, shuffle=False, drop_last=False, generator=None)
state_dict(state)
load_state_dict(state, d, *, strict=True, hyperparameters="load")
save(path, *, model=None, state=None, **extra)
load(path, *, model=None, state=None)
scale(factor)
check_finite(state)
assert_same_on_all_ranks(state)
averaged(state, model)
sharpened(f, model, rho)
Learner(model, loss, rule_or_state, *, metrics=(), callbacks=(), device=None, autocast=None, accumulate=1, \
default_callbacks=True)
learner.Learner.fit(self, train, valid=None, *, epochs=1, callbacks=())
learner.Learner.validate(self, data)
learner.Learner.predict(self, data)
learner.LearningRateScheduler(*, lr=None, scale=None)
interop.TorchOptimizer(rule_or_state, model)
interop.from_torch(optimizer, model)
interop.to_torch(state, model, optimizer)
surgery.take(state, model, index, dim=0)
surgery.grow(state, model, rows, dim=0)
surgery.reset(state, rows)
surgery.rename(state, names)
schedules.Segment(shape, *, end, start=None, steps=None)
schedules.segments(parts, total=None)
schedules.shifted(schedule, start)
schedules.warmup_cosine(peak, warmup, total)
Descent(lr=0.1)
Momentum(lr=0.01, momentum=0.9)
Nesterov(lr=0.001, momentum=0.9)
RMSProp(lr=1e-2, *, alpha=0.99, eps=1e-8, centered=False)
Rprop(lr=1e-2, *, etas=(0.5, 1.2), step_sizes=(1e-6, 50.0))
Adam(lr=1e-3, betas=(0.9, 0.999), *, eps=1e-8)
AdamW(lr=1e-3, betas=(0.9, 0.999), *, eps=1e-8, weight_decay=1e-2)
AMSGrad(lr=1e-3, betas=(0.9, 0.999), *, eps=1e-8)
NAdam(lr=2e-3, betas=(0.9, 0.999), *, eps=1e-8, momentum_decay=4e-3)
RAdam(lr=1e-3, betas=(0.9, 0.999), *, eps=1e-8)
AdaMax(lr=2e-3, betas=(0.9, 0.999), *, eps=1e-8)
AdaGrad(lr=1e-2, *, eps=1e-10)
AdaDelta(lr=1.0, *, rho=0.9, eps=1e-6)
Lion(lr=1e-4, betas=(0.9, 0.99))
OAdam(lr=1e-3, betas=(0.5, 0.9), *, eps=1e-8)
AdaBelief(lr=1e-3, betas=(0.9, 0.999), *, eps=1e-16)
WeightDecay(weight_decay=5e-4)
SignDecay(sign_decay=1e-3)
ClipGrad(clip_value=10.0)
ClipNorm(max_norm=10.0, *, norm_type=2.0, nonfinite="raise")
ClipGlobalNorm(max_norm=1.0, *, norm_type=2.0, nonfinite="raise")
OptimiserChain(*rules)
AccumGrad(n)
MixedPrecision(rule, *, dtype=torch.float32)
Muon(lr=1e-3, momentum=0.95, *, weight_decay=0.1, nesterov=True, ns_steps=5, adjust_lr_fn=None)
Adafactor(lr=1e-2, *, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0)
ScheduleFreeAdamW(lr=0.0025, betas=(0.9, 0.999), *, eps=1e-8, weight_decay=0.0, warmup_steps=0, r=0.0, \
weight_lr_power=2.0)
ScheduleFreeSGD(lr=1.0, momentum=0.9, *, weight_decay=0.0, warmup_steps=0, r=0.0, weight_lr_power=2.0)
AdEMAMix(lr=1e-3, betas=(0.9, 0.999, 0.9999), *, eps=1e-8, alpha=5.0, weight_decay=1e-2)
ADOPT(lr=1e-3, betas=(0.9, 0.9999), *, eps=1e-6)
Prodigy(lr=1.0, betas=(0.9, 0.999), *, eps=1e-8, weight_decay=0.0, d0=1e-6, d_coef=1.0)
Lookahead(rule, *, k=6, alpha=0.5)
Cautious(rule)
Averaged(rule, decay=0.999)
Lowered(rule, *, dtype=torch.bfloat16)
""".strip().splitlines()
MODULES = vars(fluxpy) | {
    "Learner": learner.Learner,
    "learner": learner,
    "interop": interop,
    "surgery": surgery,
    "torch": torch,
}
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def arguments(function: Any) -> dict[str, tuple[Any, Any]]:
    """The kind and default of each argument, but of those that take any number of others."""
    found = inspect.signature(function).parameters.values()
    return {p.name: (p.kind, p.default) for p in found if p.kind not in VARIABLE}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.partition("(")[0])
def test_arguments_are_those_that_are_written_against(call: str) -> None:
    name, _, rest = call.partition("(")
    written = arguments(eval(f"lambda {rest.removesuffix(')').replace('*, **', '**')}: 0", MODULES))
    here = arguments(eval(name, MODULES))
    more = {key: default for key, (_, default) in here.items() if key not in written}
    assert {key: here.get(key) for key in written} == written
    assert inspect.Parameter.empty not in more.values()  # whatever there is besides may be left out
    assert list(here)[: len(written)] == list(written) or all(
        inspect.signature(eval(name, MODULES)).parameters[key].kind is inspect.Parameter.KEYWORD_ONLY for key in more
    )
