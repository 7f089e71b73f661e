"""Learning rate, weight decay groups, and the optimiser's state as named tensors."""

import itertools
import math

import pytest
import torch
from torch import nn

from flash_gsa.training.optimizer import (
    build_optimizer,
    learning_rate,
    load_optimizer,
    optimizer_tensors,
)
from flash_gsa.training.recipe import OptimizerSection

CURVE = {"peak": 1e-3, "floor": 1e-4, "warmup_steps": 10, "total_steps": 110}


def test_learning_rate_at_its_corners():
    assert learning_rate(1, **CURVE) == pytest.approx(1e-4)
    assert learning_rate(10, **CURVE) == 1e-3
    assert learning_rate(60, **CURVE) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(110, **CURVE) == pytest.approx(1e-4)
    assert learning_rate(10_000, **CURVE) == pytest.approx(1e-4)


def test_learning_rate_rises_then_falls_without_jumps():
    rates = [learning_rate(step, **CURVE) for step in range(1, 111)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert max(abs(b - a) for a, b in itertools.pairwise(rates[9:])) < 1e-3 * math.pi / 200


def test_learning_rate_without_warmup_or_end():
    assert learning_rate(1, peak=1e-3, floor=0.0, warmup_steps=0, total_steps=None) == 1e-3
    assert learning_rate(500, peak=1e-3, floor=0.0, warmup_steps=10, total_steps=None) == 1e-3
    assert learning_rate(1, peak=1e-3, floor=0.0, warmup_steps=0, total_steps=1) == pytest.approx(0.0)


class Small(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embeddings = nn.Embedding(7, 4)
        self.proj = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 3, groups=4, bias=False)
        self.norm = nn.RMSNorm(4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        if tied:
            self.lm_head.weight = self.embeddings.weight

    def forward(self, ids):
        x = self.norm(self.proj(self.embeddings(ids)))
        return self.lm_head(self.conv(x.mT).mT)


SETTINGS = OptimizerSection(lr=1e-2, min_lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize(
    ("tied", "decaying"),
    [(False, {"proj.weight", "conv.weight", "lm_head.weight"}), (True, {"proj.weight", "conv.weight"})],
)
def test_what_decays(tied, decaying):
    model = Small(tied)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(model, SETTINGS).param_groups
    found = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in groups}
    assert found == {0.1: decaying, 0.0: set(names.values()) - decaying}


def test_state_survives_as_named_tensors():
    def step(model, optimizer):
        model(torch.arange(6).view(1, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    model = Small()
    optimizer = build_optimizer(model, SETTINGS)
    step(model, optimizer)
    tensors = {name: t.clone() for name, t in optimizer_tensors(optimizer, model).items()}
    assert {"optimizer/step/proj.weight", "optimizer/exp_avg/proj.weight", "optimizer/exp_avg_sq/norm.weight"} <= set(
        tensors
    )

    twin = Small()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = build_optimizer(twin, SETTINGS)
    load_optimizer(
        twin_optimizer, twin, lambda name, start, stop: tensors[name][start:stop] if start else tensors[name]
    )
    step(model, optimizer)
    step(twin, twin_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
