"""The page of the approximation experiment: share of the optimum against time, by layer, and single pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rsm_probe.paper.approximation.figures import PicturedShares
from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.page_charts import density_chart, interval_chart, tradeoff_chart
from rsm_probe.paper.page_parts import counted, result_table
from rsm_probe.paper.page_words import rule_words
from rsm_probe.paper.shown import ShownModel, pair_cells, pair_counts
from rsm_probe.report.page import Chart, Page, Section
from rsm_probe.runs.tables import Row, TableResult, with_interval

_COLUMNS = ("model", "layer", "locations", "channels", "method", "share", "low", "high", "share_5", "share_95",
            "milliseconds", "timed", "pairs")  # fmt: skip


def shown_shares(pictured: PicturedShares) -> ShownModel:
    """Convert the products of a model to what a run stores."""
    counted_pairs = [
        {"layer": layer, **pair_counts(products["optimal"], products["identity"])}
        for layer, products in pictured.products.items()
        if "identity" in products
    ]
    return ShownModel({"products": counted_pairs}, {})


def approximation_page(result: TableResult, shown: Mapping[str, ShownModel]) -> Page:
    """Lay out the page of a finished run."""
    settings, level = result.settings, result.settings["level"]
    rows = [{**row, "where": f"{row['layer']} (S = {row['locations']})", "none": math.nan} for row in result.table]
    titles = {name: _method(name) for name in distinct(rows, "method")}
    menus, hover = {"model": "model "}, {"locations": "locations", "pairs": "pairs"}
    share, time = ("share", "low", "high"), ("milliseconds", "time per pair on one core (ms)")
    tradeoff = tradeoff_chart(
        rows, time, share, "share of the optimum", titles, "method", menus={**menus, "where": "layer "}
    )
    approximate = [row for row in rows if row["method"] not in ("optimal", *settings["solvers"])]
    shares = interval_chart(
        approximate, "where", share, "share of the optimum", titles, rule="method", menus=menus, hover=hover
    )
    times = interval_chart(
        rows, "where", ("milliseconds", "none", "none"), time[1], titles, rule="method", menus=menus,
        hover={**hover, "timed": "timed pairs"}, log=True,
    )  # fmt: skip
    centred = "not centred" if settings["centering"] is None else "centred by the mean of each channel"
    by_layer = Section(
        "By layer",
        "",
        [
            Chart(
                "shares",
                shares,
                f"Share of the optimum with its {level:.0%} interval over pairs, as in Figure 5 of Wald et al. 2024.",
            ),
            Chart("times", times, "Median time per pair, on a logarithmic axis."),
        ],
    )
    sections = [
        Section(
            "Share of the optimum against time",
            "The matched product as a share of the optimum, as a ratio of sums over pairs, against the median time "
            "from the affinity to the matching. Methods that do not read the affinity compute what they need within "
            f"that time; exact solvers of other libraries are timed on the first {settings['solver_pairs']} pairs. "
            "Times are those of the machine named below.",
            [
                Chart(
                    "share-against-time",
                    tradeoff,
                    f"Up and left is better. Intervals ({level:.0%}) are over pairs.",
                    result_table("approximation", result, _COLUMNS),
                )
            ],
        ),
        by_layer,
    ]
    cells = [
        cell
        for title, of_model in shown.items()
        for one in of_model.facts.get("products", ())
        for cell in pair_cells(one, model=title, layer=one["layer"])
    ]
    if cells:
        density = density_chart(
            cells, "semantic product", "spatio-semantic product", menus={"model": "model ", "layer": "layer "},
            diagonal=True,
        )  # fmt: skip
        sections.append(
            Section(
                "Equal locations against the optimum",
                "Each cell counts pairs of images. On the dashed line, matching gains nothing; no pair can lie above "
                "it.",
                [
                    Chart(
                        "products",
                        density,
                        "Products of equal locations against optimal products of the same pairs, as in Figure 6 of "
                        "Wald et al. 2024.",
                    )
                ],
            )
        )
    return Page(
        "Approximation quality",
        "How close do fast matchings come to the optimum, and how much time do they save?",
        f"{max(row['pairs'] for row in rows):,} random pairs of images of the set {settings['images']['source']}; "
        f"{counted(distinct(rows, 'model'), 'model')}; {counted(distinct(rows, 'layer'), 'layer')}; "
        f"{counted(list(titles.values()), 'method')}; representations {centred}.",
        _answer(rows, settings["solvers"], level),
        sections,
        command="",
        provenance=_proven(rows, settings["solvers"]),
        notes=["Times depend on the machine and on what else runs on it; shares do not."],
    )


def _proven(rows: Sequence[Row], solvers: Sequence[str]) -> dict[str, str]:
    """How far the products of independent exact solvers are from the optimum, under "Certificate"; {} without any."""
    shares = [row["share"] for row in rows if row["method"] in solvers and not math.isnan(row["share"])]
    if not shares:
        return {}
    apart = max(abs(share - 1) for share in shares)
    return {
        "Certificate": f"{', '.join(solvers)} and optimal agree within {apart:.1e} of the optimum, as sums over pairs"
    }


def _method(name: str) -> str:
    return name if name.startswith("batch-optimal-") else rule_words(name)


def _answer(rows: Sequence[Row], solvers: Sequence[str], level: float) -> str:
    """What the methods reach and take in the layer with most locations of the first model."""
    mine = [row for row in rows if row["model"] == rows[0]["model"]]
    most = max(row["locations"] for row in mine)
    layer = next(row["layer"] for row in mine if row["locations"] == most)
    mine = [row for row in mine if row["layer"] == layer]
    exact = [row for row in mine if row["method"] in ("optimal", *solvers)]
    others = [row for row in mine if row not in exact and not math.isnan(row["share"])]
    times = ", ".join(f"{_method(row['method'])} {row['milliseconds']:.3g} ms" for row in exact)
    where = f"{layer} of {mine[0]['model']} (S = {most}, the most locations of this model)"
    if not others:
        return f"In {where}, exact solvers take: {times}. No other method has a share of the optimum in this run."
    reached = ", ".join(f"{_method(row['method'])} {with_interval(row, 'share')}" for row in others)
    fast = ", ".join(f"{_method(row['method'])} {row['milliseconds']:.3g} ms" for row in others)
    return (
        f"In {where}, methods reach these shares of the optimum, with {level:.0%} intervals over pairs: {reached}. "
        f"They take {fast} per pair on one core, and exact solvers take {times}."
    )
