"""What a model holds, to compare before and after."""

from torch.nn.modules.batchnorm import _BatchNorm


def attributes(model):
    """Return class and attributes of all modules: tensors and hooks by identity."""
    return [
        (type(m), {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()})
        for m in model.modules()
    ]


def layers_of(model):
    """Return the batch norms of a model, ours and those of torch."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def buffers_of(model):
    """Return copies of all buffers by name."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}
