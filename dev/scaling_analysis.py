"""Fit scaling laws to the CSV of runs/scaling_laws.sh: the best size for each FLOPs budget, and its growth.

    python -m dev.scaling_analysis results.csv [--out scaling.png]

For each budget, validation bits per byte is a parabola in the logarithm of the scaling parameters; its lowest
point is the best size. Best sizes and their tokens are power laws of the budget. [Hoffmann 2022, approach 2]
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat.common import UserError
from nanochat.configurator import option, run


@dataclass(frozen=True)
class Config:
    results: str = option(..., "CSV that the sweep wrote")
    out: str = option("", "file for the picture (default: beside the CSV, as .png)")


@dataclass(frozen=True, slots=True)
class Budget:
    """The runs of one FLOPs budget and the parabola through them."""

    flops: float
    params: np.ndarray  # scaling parameters: transformer matrices and output head
    tokens: np.ndarray
    bpb: np.ndarray
    parabola: np.ndarray  # coefficients in log10(params), highest power first

    @property
    def best_params(self) -> float:
        return float(10 ** (-self.parabola[1] / (2 * self.parabola[0])))

    @property
    def best_tokens(self) -> float:
        """Tokens that the budget pays for at the best size, read off the runs on a log-log scale."""
        order = np.argsort(self.params)
        log_tokens = np.interp(
            np.log(self.best_params), np.log(self.params[order]), np.log(self.tokens[order])
        )
        return float(np.exp(log_tokens))

    @property
    def best_bpb(self) -> float:
        return float(np.polyval(self.parabola, np.log10(self.best_params)))

    @property
    def is_bracketed(self) -> bool:
        """Whether the lowest point lies between the smallest and the largest model."""
        return self.parabola[0] > 0 and self.params.min() <= self.best_params <= self.params.max()


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """value = scale * flops ** exponent"""

    scale: float
    exponent: float

    def __call__(self, flops: float) -> float:
        return self.scale * flops**self.exponent


def main(cfg: Config) -> None:
    """Print the best size of each budget and how it grows, and draw it."""
    path = Path(cfg.results)
    budgets = read_budgets(path)
    print(report(budgets))
    out = Path(cfg.out) if cfg.out else path.with_suffix(".png")
    draw(budgets, out)
    print(f"\npicture: {out}")


def read_budgets(path: Path) -> list[Budget]:
    """The budgets of a sweep with at least three runs each, in ascending order."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["val_bpb"]]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run: bash runs/scaling_laws.sh") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except KeyError as error:
        raise UserError(f"{path} has no column {error}; it must come from runs/scaling_laws.sh") from None
    budgets = []
    for flops in sorted({float(row["flops_budget"]) for row in rows}):
        chosen = [row for row in rows if float(row["flops_budget"]) == flops]
        if len(chosen) >= 3:
            budgets.append(fit_budget(flops, chosen))
    if not budgets:
        raise UserError(f"{path} has no budget with three finished runs; a parabola needs three")
    return budgets


def fit_budget(flops: float, rows: Sequence[dict[str, str]]) -> Budget:
    """Least-squares parabola of bits per byte in log10 of the scaling parameters."""
    params = np.array([float(row["params_transformer"]) + float(row["params_lm_head"]) for row in rows])
    tokens = np.array([float(row["tokens_trained"]) for row in rows])
    bpb = np.array([float(row["val_bpb"]) for row in rows])
    return Budget(flops, params, tokens, bpb, np.polyfit(np.log10(params), bpb, 2))


def fit_power_law(flops: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """Least squares on a log-log scale."""
    exponent, intercept = np.polyfit(np.log(flops), np.log(values), 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def report(budgets: Sequence[Budget]) -> str:
    """The table of best sizes and, from two budgets on, their growth."""
    lines = [f"{'FLOPs':>9} {'best params':>12} {'tokens':>10} {'ratio':>6} {'val bpb':>8}"]
    for budget in budgets:
        note = "" if budget.is_bracketed else "  outside the models of this budget: extrapolated"
        lines.append(
            f"{budget.flops:9.2e} {budget.best_params:12.3e} {budget.best_tokens:10.3e}"
            f" {budget.best_tokens / budget.best_params:6.1f} {budget.best_bpb:8.4f}{note}"
        )
    inside = [budget for budget in budgets if budget.is_bracketed]
    if len(inside) >= 2:
        flops = [budget.flops for budget in inside]
        params = fit_power_law(flops, [budget.best_params for budget in inside])
        tokens = fit_power_law(flops, [budget.best_tokens for budget in inside])
        lines += [
            "", f"best params ~ FLOPs^{params.exponent:.3f}", f"best tokens ~ FLOPs^{tokens.exponent:.3f}",
        ]  # fmt: skip
    return "\n".join(lines)


def draw(budgets: Sequence[Budget], path: Path) -> None:
    """Bits per byte against size, one parabola per budget with its lowest point."""
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter

    from nanochat.plots import INK, new_figure, save, style

    with style():
        figure, (axis,) = new_figure(
            "Best size for a budget", "validation bits per byte; each parabola is one FLOPs budget", 1, 4.6
        )
        for place, budget in enumerate(budgets):
            color = colormaps["viridis"](0.1 + 0.75 * place / max(1, len(budgets) - 1))
            grid = np.geomspace(budget.params.min(), budget.params.max(), 100)
            curve = np.polyval(budget.parabola, np.log10(grid))
            axis.plot(grid, curve, color=color, label=f"{budget.flops:.3g} FLOPs")
            axis.plot(budget.params, budget.bpb, "o", color=color, markersize=5)
            if budget.is_bracketed:
                axis.plot([budget.best_params], [budget.best_bpb], "*", color=INK, markersize=11, zorder=5)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlabel("scaling parameters; star: lowest point", fontsize=9)
        axis.legend(frameon=False, fontsize=9)
    save(figure, path)


if __name__ == "__main__":
    run(Config, main)
