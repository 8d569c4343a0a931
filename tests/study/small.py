"""What the tests of the study share: small data, a small plan, made-up results, one claim."""

from dataclasses import replace

import numpy as np
from torch import nn

from batchnorm.study import recipes
from batchnorm.study.claims import judge
from batchnorm.study.data import DataSet, load
from batchnorm.study.networks import NETWORKS
from batchnorm.study.observation import Result
from batchnorm.study.plan import Plan, plan
from batchnorm.study.recipes import PLAIN
from batchnorm.study.training import Run


def small_data(name="small"):
    """A part of the digits: two batches of 60, and 50 examples to try."""
    whole = load("digits")
    train = whole.train_inputs[:120], whole.train_labels[:120]
    return DataSet(name, *train, whole.test_inputs[:50], whole.test_labels[:50], 10)


def small_plan(data_set, seeds=(0, 1), steps=8, rates=None):
    """A plan whose networks are trained for a few steps, with two learning rates or as told."""
    made = plan(data_set)
    small = {
        name: replace(network, steps=steps, rates=rates or (0.1, network.usual_rate))
        for name, network in made.networks.items()
    }
    return replace(made, networks=small, seeds=seeds, repeats=2)


def plan_of(*rates, steps=100, seeds=(0, 1, 2)):
    """A plan for made-up outcomes, of one network."""
    conv = replace(NETWORKS["conv"], steps=steps, rates=rates, usual_rate=rates[0])
    return Plan("made up", 0.1, (1, 8, 8), {"conv": conv}, seeds=seeds, repeats=3)


def result(accuracies, reason="", **more):
    """A result with one accuracy a step."""
    steps = list(range(1, len(accuracies) + 1))
    losses = [1.0 / step for step in steps]
    return Result(losses=losses, steps=steps, accuracies=list(accuracies), reason=reason, **more)


def rising(step, steps=100, high=0.9):
    """Accuracies that jump from chance to high at a step, and stay there."""
    return np.where(np.arange(1, steps + 1) >= step, high, 0.1).tolist()


def many_runs():
    """More runs than are done before a test can stop them."""
    network = NETWORKS["sigmoid"]
    return [Run("small", network, PLAIN, 1.0, seed, steps=100) for seed in range(24)]


def studied(claim, part, made, data_set, store):
    """Do what a part of a claim asks for, here and now, and judge it."""
    tasks = {}
    for task in claim.tasks(made, part):
        tasks[task] = tasks[task].united(task) if task in tasks else task
    for task in tasks.values():
        if task not in store:
            store.add(task, task.perform(data_set))
    return judge(claim, [part], made, store)


def without_normalization(monkeypatch):
    """Let every normalization of the study's networks be the identity, with biases as without."""
    monkeypatch.setattr(recipes, "norm_layer", lambda *_, **__: nn.Identity())
    monkeypatch.setattr(recipes.After, "bias", True)
