"""Triton's interpreter, which runs the programs of a GPU in NumPy: as a GPU rounds, and faster.

It cuts bfloat16 off where a GPU rounds to the nearest, ties to even, and converts it from and to
no type but float32. And it takes the language apart anew wherever one function calls another.
"""

import warnings

import numpy as np


def mend():
    """Let the interpreter convert bfloat16 as a GPU does, and prepare a launch once."""
    import triton.language as tl
    from triton.runtime import interpreter

    def cast(self, value, to):
        source, target = value.dtype.scalar, to.scalar
        data = value.data
        if source == tl.bfloat16:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        if target == tl.bfloat16:
            with np.errstate(over="ignore"):
                bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            data = np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)
            return interpreter.TensorHandle(data, target)
        return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(to)), target)

    interpreter.InterpreterBuilder.cast_impl = cast
    interpreter.InterpretedFunction.__call__ = lambda self, *given, **named: self.rewrite()(
        *given, **named
    )
    launch = interpreter.GridExecutor.__call__

    def launch_quietly(self, *given, **named):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a GPU says nothing of what is not finite
            prepared = interpreter._patch_lang(tl.zeros.fn)  # what is called needs no more
            try:
                launch(self, *given, **named)
            finally:
                prepared.restore()

    interpreter.GridExecutor.__call__ = launch_quietly
