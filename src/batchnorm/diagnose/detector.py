"""Shift in serving: a detector that hears every batch, and has a stated rate of false alarms."""

from __future__ import annotations

import math
import warnings
from collections import deque
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from batchnorm.diagnose.accuracy import examples_in
from batchnorm.diagnose.evidence import excess
from batchnorm.diagnose.look import TOLERANCE, Look, check_settings, evidence_of, known
from batchnorm.diagnose.observe import observed
from batchnorm.diagnose.shift_report import ShiftReport
from batchnorm.models.walk import Where, batch_norms

#: What is taken off each look, in standard deviations of chance: half of the shift that is to be
#: found soonest, by the theory of the cumulative sum.
_SLACK = 0.5
#: A single look counts no more than this, so that one odd batch is no alarm by itself at the
#: thresholds in use.
_MOST = 4.0
_KEPT = 1000


class DetectorLook(NamedTuple):
    """What a window of examples said.

    Attributes:
        examples: How many there were since the start, with those of this window.
        z: How far its score is above chance, in standard deviations.
        sum: The cumulative sum after it.
        alarm: Whether it is above the threshold.
    """

    examples: int
    z: float
    sum: float
    alarm: bool


class ShiftDetector:
    """Hear what a network in use gets, and tell when it is no longer what it was trained on.

    Windows of examples are compared with the running statistics as `measure_shift` does, on a few
    layers, and there at some of the channels and positions, so that it costs little. Each gives a
    number z, standard normal where nothing has shifted, and these are summed up,

        S <- max(0, S + min(z, 4) - 1/2)        alarm where S > h

    a cumulative sum, which finds small shifts that last as well as large ones. The threshold h is
    such that without a shift there are `run_length` windows between two alarms on average:
    run_length = 2 (exp(b) - b - 1), b = h + 1.166.

    Inside `with detector:`, or between `start` and `stop`, it hears every call of the model in
    evaluation, without another pass, whatever the sizes of the batches; one at a time, not from
    several threads at once. Calls in training are not heard, nor are calls of a part of the model.
    A model that `torch.compile` has made is heard if its first call is; else there is a warning.

    Args:
        model: The model, with batch norms of `torch.nn` or of ours.
        window: How many examples are looked at together. Fewer find large shifts sooner, more find
            small ones.
        run_length: How many windows there are, on average, between two false alarms.
        layers: How many layers are heard, evenly over the depth of the model.
        channels: About how many channels of each, evenly over all of them.
        positions: How many positions, drawn anew for each example.
        where: Which layers they are chosen from; see `freeze`.
        train_batch_size: See `measure_shift`.
        tolerance: Likewise; it is taken off each score, so that what the running statistics are off
            by, in every window the same, does not sum up.

    Raises:
        ValueError: The model has no batch norm with running statistics; `where` names none; or a
            number is too small: `window` below 8, another below 1.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)).eval()
        >>> _ = bn.calibrate(model, [torch.randn(1000, 3)])
        >>> with bn.ShiftDetector(model) as detector:
        ...     for _ in range(100):
        ...         y = model(torch.randn(16, 3))
        ...     before = detector.alarm
        ...     for _ in range(10):
        ...         y = model(torch.randn(16, 3) + 1)
        >>> before, detector.alarm
        (False, True)

    Source:
        Page, Continuous inspection schemes, 1954. Siegmund, Sequential analysis, 1985, for the
        threshold.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int = 32,
        run_length: float = 1000,
        layers: int = 8,
        channels: int = 256,
        positions: int = 16,
        where: Where = None,
        train_batch_size: int = 32,
        tolerance: float = TOLERANCE,
    ) -> None:
        for what, number, least in (
            ("window", window, 8),
            ("run_length", run_length, 1),
            ("layers", layers, 1),
            ("channels", channels, 1),
            ("positions", positions, 1),
        ):
            if number < least:
                raise ValueError(f"{what} is {number}: expected {least} or more")
        check_settings(None, train_batch_size)
        found = batch_norms(model, where)
        names = list(known(model, found, train_batch_size)[0])
        last, count = len(names) - 1, min(layers, len(names))
        at = [round(place * last / max(count - 1, 1)) for place in range(count)]
        self.layers = {names[place]: found[names[place]] for place in at}
        self.run_length, self.threshold = run_length, threshold(run_length)
        self._looks: deque[DetectorLook] = deque(maxlen=_KEPT)
        self._alarm = False
        self._model, self._window = model, window
        self._channels, self._positions = channels, positions
        self._train_batch_size, self._tolerance = train_batch_size, tolerance
        self._sum, self._examples, self._not_finite = 0.0, 0, 0
        self._is_heard = self._is_warned = False
        self._attached: ExitStack | None = None
        self._full: Look | None = None
        self._begin()

    @property
    def alarm(self) -> bool:
        """Whether there was an alarm since the start, or since `reset`.

        Returns:
            That.

        Example:
            >>> import batchnorm as bn
            >>> bn.ShiftDetector(bn.BatchNorm(3)).alarm
            False
        """
        return self._alarm

    @property
    def looks(self) -> list[DetectorLook]:
        """What the last 1,000 windows said, of which each has a z and the sum after it.

        Returns:
            The oldest first.

        Example:
            >>> import batchnorm as bn, torch
            >>> model = bn.BatchNorm(3).eval()
            >>> with bn.ShiftDetector(model) as detector:
            ...     y = model(torch.randn(40, 3))
            >>> [look.examples for look in detector.looks]
            [40]
        """
        return list(self._looks)

    @property
    def not_finite(self) -> int:
        """How many examples were NaN or infinite in some layer: no window counts them.

        Returns:
            Their number since the start, or since `reset`.

        Example:
            >>> import batchnorm as bn, torch
            >>> model = bn.BatchNorm(3).eval()
            >>> with bn.ShiftDetector(model) as detector:
            ...     y = model(torch.full((8, 3), torch.nan))
            >>> detector.not_finite
            8
        """
        now = (each.not_finite for each in self._look.evidence.values())
        return self._not_finite + max(now, default=0)

    def start(self) -> ShiftDetector:
        """Begin to hear.

        Returns:
            This detector.

        Raises:
            RuntimeError: It hears already.

        Example:
            >>> import batchnorm as bn
            >>> detector = bn.ShiftDetector(bn.BatchNorm(3)).start()
            >>> detector.stop()
        """
        if self._attached is not None:
            raise RuntimeError("this detector hears already: stop it first")
        with ExitStack() as stack:
            stack.enter_context(observed(self.layers, self._hear))
            for handle in (
                self._model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
                self._model.register_forward_hook(lambda *_: self._heard()),
            ):
                stack.callback(handle.remove)
            self._attached = stack.pop_all()
        return self

    def stop(self) -> None:
        """Hear nothing more; what was heard is kept.

        Example:
            >>> import batchnorm as bn
            >>> bn.ShiftDetector(bn.BatchNorm(3)).stop()
        """
        if self._attached is not None:
            self._attached.close()
            self._attached = None

    def __enter__(self) -> ShiftDetector:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def reset(self) -> None:
        """Forget what was heard, as after an alarm that was seen to.

        Example:
            >>> import batchnorm as bn
            >>> detector = bn.ShiftDetector(bn.BatchNorm(3))
            >>> detector.reset()
            >>> detector.alarm
            False
        """
        self._alarm, self._sum, self._examples, self._not_finite = False, 0.0, 0, 0
        self._looks.clear()
        self._full = None
        self._begin()

    def report(self) -> ShiftReport:
        """Return what the last full window says, layer by layer.

        Returns:
            As `measure_shift`, for the layers and positions that are heard.

        Raises:
            ValueError: No window was full yet.

        Example:
            >>> import batchnorm as bn, torch
            >>> model = bn.BatchNorm(3).eval()
            >>> with bn.ShiftDetector(model) as detector:
            ...     y = model(torch.randn(40, 3))
            >>> detector.report().examples
            40
        """
        if self._full is None:
            raise ValueError(
                f"there were {self._look.count} examples yet: a window is {self._window}"
            )
        return self._full.report()

    def _begin(self) -> None:
        with torch.inference_mode(False):  # what is made inside could not be written to outside
            evidence, _ = evidence_of(self.layers, self._train_batch_size, self._channels)
        self._look = Look(evidence, self._positions, seed=self._examples)

    def _before(self, _: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._look.begin(examples_in((args, keywords)))
        self._is_heard = False

    def _hear(self, name: str, seen: Any) -> None:
        self._is_heard = True
        if not self.layers[name].training:
            self._look(name, seen)

    @torch.no_grad()
    def _heard(self) -> None:
        """Test, if the window is full, after a call of the model."""
        if not self._is_heard and not self._is_warned:
            self._is_warned = True
            warnings.warn(
                "the detector hears nothing: this model was compiled before it listened, or calls "
                "none of its layers. Start it before the first call, or give it the model as it "
                "was written",
                RuntimeWarning,
                stacklevel=2,
            )
        new = self._look.count
        if new < self._window:
            return
        ran = [self._look.evidence[name] for name in self._look.order]
        z = excess([each.compare() for each in ran if each.count > 1], self._tolerance)
        self._sum = max(0.0, self._sum + min(z, _MOST) - _SLACK)
        alarm = self._sum > self.threshold
        self._alarm |= alarm
        self._examples += new
        self._not_finite += max(each.not_finite for each in ran)
        self._looks.append(DetectorLook(self._examples, z, self._sum, alarm))
        self._full = self._look
        self._begin()

    def __repr__(self) -> str:
        state = "ALARM" if self.alarm else "no alarm"
        odd = f", {self.not_finite:,} not finite" if self.not_finite else ""
        return (
            f"ShiftDetector: {state}, {self._examples:,} examples{odd}, sum {self._sum:.2f} of "
            f"{self.threshold:.2f}"
        )


def threshold(run_length: float) -> float:
    """Return the threshold of the cumulative sum with so many looks between false alarms.

    Args:
        run_length: The average run length.
    """
    low, high = 1.166, 100.0
    for _ in range(100):
        b = (low + high) / 2
        length = (math.expm1(2 * _SLACK * b) - 2 * _SLACK * b) / (2 * _SLACK**2)
        low, high = (b, high) if length < run_length else (low, b)
    return low - 1.166
