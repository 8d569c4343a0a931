"""Write data/conventions.json: what batch normalization is to Keras and to Flax, in numbers.

The tests read the file, so that they need neither. To make it anew, in an environment of its own:
`pip install keras flax`, and `python tests/make_conventions.py`. Keras runs on JAX here, so that
nothing of what the tests compare with was computed by PyTorch.
"""

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data" / "conventions.json"

#: Shape of a batch and settings, by the names that both have.
CASES = {
    "default": ((6, 3), {}),
    "settings": ((6, 3), {"momentum": 0.9, "epsilon": 1e-5}),
    "channels first": ((3, 4, 5), {"axis": 1, "momentum": 0.75}),
    "channels last": ((2, 3, 2, 4), {"axis": 3, "epsilon": 0.1}),
    "no center": ((6, 3), {"center": False, "momentum": 0.5}),
    "no scale": ((6, 3), {"scale": False, "momentum": 0.5}),
    "neither": ((6, 3), {"center": False, "scale": False, "momentum": 0.5}),
    "momentum 0": ((6, 3), {"momentum": 0.0}),
    "momentum 1": ((6, 3), {"momentum": 1.0}),
}
STEPS = 2


def main():
    """Run both frameworks on the same cases, and write what they gave."""
    os.environ["KERAS_BACKEND"] = "jax"
    rng = np.random.default_rng(0)
    cases = []
    for name, (shape, settings) in CASES.items():
        channels = shape[settings.get("axis", -1)]
        inputs = rng.normal(1.0, 3.0, (STEPS, *shape)).astype(np.float32)
        drawn = rng.uniform(0.5, 2.0, (4, channels)).astype(np.float32)
        start = dict(zip(("gamma", "beta", "mean", "var"), drawn, strict=True))
        for framework, run in (("keras", run_keras), ("flax", run_flax)):
            result = run(settings, start, inputs)
            cases.append({"framework": framework, "name": name, "inputs": inputs, **result})
    versions = {name: importlib.metadata.version(name) for name in ("keras", "flax", "jax")}
    DATA.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(plain(case)) for case in cases)
    text = f'{{"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]}}\n'
    DATA.write_text(text, encoding="utf-8")


def run_keras(settings, start, inputs):
    """Return a Keras layer's settings, its weights before, and what it gave step by step."""
    import keras

    layer = keras.layers.BatchNormalization(**settings)
    layer.build(inputs[0].shape)
    parameters = {"gamma": layer.scale, "beta": layer.center, "mean": True, "var": True}
    layer.set_weights([start[name] for name, there in parameters.items() if there])
    before = layer.get_weights()
    steps = [
        {
            "y": layer(x, training=True),
            "mean": layer.get_weights()[-2],
            "var": layer.get_weights()[-1],
        }
        for x in inputs
    ]
    after = layer.get_weights()
    y = layer(inputs[0], training=False)
    return {
        "settings": layer.get_config(),
        "before": before,
        "after": after,
        "steps": steps,
        "y": y,
    }


def run_flax(settings, start, inputs):
    """Return a Flax module's fields, its variables before, and what it gave step by step."""
    import flax
    import jax

    names = {"center": "use_bias", "scale": "use_scale"}
    module = flax.linen.BatchNorm(**{names.get(name, name): at for name, at in settings.items()})
    variables = module.init(jax.random.key(0), inputs[0], use_running_average=False)
    known = {"scale": "gamma", "bias": "beta", "mean": "mean", "var": "var"}
    before = variables = {
        group: {name: start[known[name]] for name in arrays} for group, arrays in variables.items()
    }
    steps = []
    for x in inputs:
        y, changed = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **changed}
        steps.append({"y": y, **variables["batch_stats"]})
    y = module.apply(variables, inputs[0], use_running_average=True)
    fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    written = {name: at for name, at in fields.items() if isinstance(at, bool | int | float | None)}
    return {"settings": written, "before": before, "after": variables, "steps": steps, "y": y}


def plain(value):
    """Return arrays as lists of numbers, with the nine digits that tell a float32 from another."""
    if isinstance(value, dict):
        return {name: plain(at) for name, at in value.items()}
    if isinstance(value, list | tuple):
        return [plain(at) for at in value]
    if hasattr(value, "shape"):
        return plain(np.asarray(value, np.float64).tolist())
    return float(f"{value:.9g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
