"""A certificate: what was measured of a model, printed, written as JSON, and verified against the weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ace.errors import AceError, CertificateMismatch
from ace.history import replace_file
from ace.symmetry import unwrapped

FORMAT = 1
"""Version of the file."""
Interval = tuple[float, float | None]


@dataclass(frozen=True)
class Errors:
    """Errors over samples and elements, in units of the root mean square of the output; see `ace.certification`.

    Attributes:
        mean: Mean over samples and elements.
        mean_interval: Its confidence interval; None for a single sample.
        percentile: The 95th percentile of samples and elements.
        percentile_interval: Its confidence interval; its upper end is None where the samples are too few for one.
        rms: Root mean square, which is what ``ace.EquivarianceError`` constrains.
        rms_interval: Its confidence interval; None for a single sample.
        max: The largest.
    """

    mean: float
    mean_interval: Interval | None
    percentile: float
    percentile_interval: Interval
    rms: float
    rms_interval: Interval | None
    max: float


@dataclass(frozen=True)
class Bound:
    """What bounds (or estimates from above, to first order) the error on the samples and elements measured.

    Attributes:
        rms: Root mean square of the bounds of all samples and elements, in the units of the errors.
        max: The largest.
        looseness: ``rms`` divided by the measured root mean square; None where that is 0.
        samples: Number of samples.
    """

    rms: float
    max: float
    looseness: float | None
    samples: int


@dataclass(frozen=True)
class GroupErrors:
    """What was measured under one group.

    Attributes:
        group: The group.
        errors: Errors in the model's own dtype.
        float64: Errors of a copy in float64: what is left of ``errors`` beyond rounding.
        floor: Errors of the restored model (every γ = 0) in float64: what the architecture itself leaves.
        bound: The bound on ``float64``, or None where there is none; ``Certificate.no_bound`` says why.
        estimate: The same sum with local Lipschitz constants estimated at the data, which is no bound; or None.
    """

    group: str
    errors: Errors
    float64: Errors
    floor: Errors
    bound: Bound | None
    estimate: Bound | None


@dataclass(frozen=True)
class Certificate:
    """What ``certify`` found; ``print`` shows it as a table.

    Attributes:
        model: Class of the model.
        digest: SHA-256 of its state dict.
        keys: Key of the state dict -> dtype, shape and first digits of the SHA-256 of each tensor.
        dtype: The model's own dtype.
        inputs: Type of each input by name.
        outputs: Type of each output.
        samples: Number of samples S.
        elements: Number of random elements K of each sample.
        confidence: Of the intervals.
        above_max: With that confidence, at most this share of new samples shows, under K new elements, an error above
            the largest seen.
        size: Root mean square c of the output over the samples, the unit of all errors (1 for several outputs, whose
            squares are each divided by their mean over the batch and summed).
        gammas: Relaxation strength of each relaxed layer; empty for a model without terms.
        projection_gap: Root mean square of what removing the terms changes, in units of that of the restored model's
            output; 0 without terms.
        gap_bound: The bound on the projection gap, in the same units; None where there is none.
        gap_estimate: The estimate of it, which is no bound.
        no_bound: Why there is no bound; empty where there is one.
        no_estimate: Why there is no estimate.
        groups: What was measured, by name of the group.
        seed: Seed of elements and bootstrap.
        versions: Versions of ace and torch.
    """

    model: str
    digest: str
    keys: dict[str, str]
    dtype: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    samples: int
    elements: int
    confidence: float
    above_max: float
    size: float
    gammas: dict[str, float]
    projection_gap: float
    gap_bound: Bound | None
    gap_estimate: Bound | None
    no_bound: str
    no_estimate: str
    groups: dict[str, GroupErrors]
    seed: int
    versions: dict[str, str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the certificate as JSON; the file at ``path`` is the old one or the new one, never half of one.

        Raises:
            NotWritten: The file cannot be written.
        """
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        replace_file(Path(path), json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False).encode())

    def __str__(self) -> str:
        percent = f"{100 * self.confidence:g} %"
        lines = [f"{self.model}  {self.digest[:16]}  {self.dtype}"]
        lines += [f"{self.samples} samples, each moved by {self.elements} random elements; intervals of {percent}"]
        for name, found in self.groups.items():
            head = (f"error under {name}", "mean", "95th percentile", "max", "root mean square")
            rows = [head]
            measured = {"as it is": found.errors, "float64": found.float64, "γ = 0, float64": found.floor}
            for label, errors in measured.items():
                rows.append(
                    (
                        label,
                        _with_interval(errors.mean, errors.mean_interval),
                        _with_interval(errors.percentile, errors.percentile_interval),
                        f"{errors.max:.2e}",
                        _with_interval(errors.rms, errors.rms_interval),
                    )
                )
            for label, bound in (("bound", found.bound), ("estimate, no bound", found.estimate)):
                if bound is not None:
                    loose = "" if bound.looseness is None else f" = {bound.looseness:.3g} × measured"
                    cell = f"{bound.rms:.2e}{loose} ({bound.samples} samples)"
                    rows.append((label, "", "", f"{bound.max:.2e}", cell))
            widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
            lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
        lines.append(
            f"with {percent} confidence at most {100 * self.above_max:.2g} % of new samples exceed the max "
            f"(from {self.samples} samples)"
        )
        if not self.gammas:
            lines.append("no relaxation terms: the projection gap is 0")
        else:
            largest = max(self.gammas, key=lambda path: abs(self.gammas[path]))
            gap = f"projection gap {self.projection_gap:.2e}"
            gap += "" if self.gap_bound is None else f" (bound {self.gap_bound.rms:.2e})"
            lines.append(
                f"{gap}, {self.samples} samples; {len(self.gammas)} terms, largest |γ| {abs(self.gammas[largest]):.3g} "
                f"at {largest or '(root)'}"
            )
        missing = {"bound": self.no_bound, "estimate": self.no_estimate} if self.gammas else {}
        lines += [f"no {what}: {why}" for what, why in missing.items() if why]
        return "\n".join(line.rstrip() for line in lines)


def load_certificate(path: str | os.PathLike[str], model: nn.Module) -> Certificate:
    """Read a certificate and verify that it was made for these weights.

    A copy in another dtype is another model: its weights were rounded, and its error is another one.

    Args:
        path: A file that ``Certificate.save`` wrote.
        model: The model, possibly wrapped.

    Returns:
        The certificate.

    Raises:
        CertificateMismatch: It was made for another class or other weights; the message says what differs.
        AceError: The file is missing, damaged, or of another version.

    Example:
        >>> import tempfile
        >>> from ace.certification import certify
        >>> from ace.groups import SO3
        >>> file, model = Path(tempfile.mkdtemp()) / "certificate.json", nn.Linear(3, 3)
        >>> made = certify(model, [torch.ones(4, 5, 3)], SO3(), inputs={0: "vector"}, outputs="vector", path=file)
        >>> load_certificate(file, model) == made
        True
        >>> _ = nn.init.zeros_(model.bias)
        >>> load_certificate(file, model)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ace.errors.CertificateMismatch: certificate.json is not of this model: other values of bias
    """
    certificate = _from_json(Path(path))
    plain = unwrapped(model)
    digest, keys = fingerprint(plain)
    problems = []
    if type(plain).__qualname__ != certificate.model:
        problems.append(f"it is of a {certificate.model}, this is a {type(plain).__qualname__}")
    if digest != certificate.digest:
        listed = {
            "missing here": [key for key in certificate.keys if key not in keys],
            "only here": [key for key in keys if key not in certificate.keys],
        }
        shared = [key for key in keys if key in certificate.keys]
        both = [(key, keys[key].rsplit(" ", 1), certificate.keys[key].rsplit(" ", 1)) for key in shared]
        listed["another dtype or shape"] = [
            f"{key} ({here[0]} here, {there[0]} certified)" for key, here, there in both if here[0] != there[0]
        ]
        listed["other values of"] = [key for key, here, there in both if here[0] == there[0] and here[1:] != there[1:]]
        problems += [f"{what} {_some(names)}" for what, names in listed.items() if names]
        problems = problems or ["its weights differ"]
    if problems:
        raise CertificateMismatch(
            f"{path} is not of this model: {'; '.join(problems)}. Load the weights it was made for, or certify these"
        )
    return certificate


def fingerprint(model: nn.Module) -> tuple[str, dict[str, str]]:
    """Return the SHA-256 of a state dict, and for each key dtype, shape and the first digits of its own.

    Example:
        >>> fingerprint(nn.Linear(1, 1))[1]["bias"].rsplit(" ", 1)[0]
        'float32 (1,)'
    """
    keys = {}
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            kind = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        else:  # the extra state of a module
            content, kind = repr(value).encode(), type(value).__name__
        keys[key] = f"{kind} {hashlib.sha256(content).hexdigest()}"
    whole = hashlib.sha256("\n".join(f"{key} {value}" for key, value in keys.items()).encode()).hexdigest()
    return whole, {key: value[: value.rindex(" ") + 17] for key, value in keys.items()}


def _with_interval(value: float, interval: Interval | None) -> str:
    if interval is None:
        return f"{value:.2e}"
    low, high = interval
    return f"{value:.2e} [{low:.2e}, {'–' if high is None else f'{high:.2e}'}]"


def _some(names: list[str]) -> str:
    more = "" if len(names) <= 5 else f" and {len(names) - 5} more"
    return ", ".join(names[:5]) + more


def _from_json(path: Path) -> Certificate:
    """Read a file, and refuse it with all that is wrong with it."""
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise AceError(f"{path} does not exist: there is no certificate to load") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AceError(f"{path} cannot be read as a certificate ({error}): it is truncated or altered") from error
    if not isinstance(content, dict) or "format" not in content:
        raise AceError(f"{path} was not written by ace.certify: it has no format")
    version = content.pop("format")
    if version != FORMAT:
        raise AceError(f"{path} is a certificate of format {version!r}; this version of ace reads format {FORMAT}")
    problems: list[str] = []
    certificate = _read(content, Certificate, "", problems)
    if problems:
        raise AceError(f"{path} is damaged: " + "; ".join(problems))
    assert isinstance(certificate, Certificate)
    return certificate


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number")


def _read(value: Any, kind: Any, where: str, problems: list[str]) -> Any:
    """Turn what JSON holds into an object of a type; note what does not fit."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        inside = f"{where}." if where else ""
        problems += [f"{inside}{name} is missing" for name in hints if name not in value]
        problems += [f"{inside}{name} is unknown" for name in value if name not in hints]
        if set(hints) != set(value):
            return None
        return kind(**{name: _read(value[name], hint, f"{inside}{name}", problems) for name, hint in hints.items()})
    if origin is types.UnionType:
        return None if value is None else _read(value, parts[0], where, problems)
    if origin is dict and isinstance(value, dict):
        return {key: _read(part, parts[1], f"{where}.{key}", problems) for key, part in value.items()}
    if origin is tuple and isinstance(value, list) and len(value) == len(parts):
        return tuple(_read(part, hint, where, problems) for part, hint in zip(value, parts, strict=True))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    problems.append(f"{where} is {value!r}")
    return None
