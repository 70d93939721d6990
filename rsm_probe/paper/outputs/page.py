"""The page of the outputs experiment: correlations by rule, differences from each baseline, and all pairs of images."""

from __future__ import annotations

from collections.abc import Mapping

from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.outputs.figures import PicturedPairs
from rsm_probe.paper.page_charts import density_chart, interval_chart
from rsm_probe.paper.page_parts import (
    TABLES_NOTE,
    VALUE,
    by_measure,
    cost_text,
    differences_section,
    result_table,
    setting_of,
)
from rsm_probe.paper.page_words import rule_titles, rule_words, semantic_answer
from rsm_probe.paper.shown import ShownModel, pair_cells, pair_counts
from rsm_probe.report.page import Chart, Page, Section
from rsm_probe.runs.tables import TableResult, kernel_title

MEASURES = {"pearson": "Pearson correlation", "spearman": "Spearman's rank correlation"}


def shown_pairs(pictured: PicturedPairs) -> ShownModel:
    """Convert the pairs of a model to what a run stores."""
    counted = [
        {"matching": matching, "kernel": kernel, **pair_counts(values, pictured.divergence)}
        for (matching, kernel), values in pictured.similarities.items()
    ]
    return ShownModel({"pairs": counted, "count": len(pictured.divergence)}, {})


def outputs_page(result: TableResult, shown: Mapping[str, ShownModel]) -> Page:
    """Lay out the page of a finished run."""
    settings, level = result.settings, result.settings["level"]
    rows = [{**row, "kernel_name": kernel_title(row["kernel"])} for row in result.table]
    # Each model has one layer.
    menus = {"kernel_name": "kernel "}
    both = by_measure(rows, {title: (key, f"{key}_low", f"{key}_high") for key, title in MEASURES.items()})
    chart = interval_chart(
        both, "model", VALUE, "correlation",
        rule_titles(rows), menus={"measure": "measure ", **menus}, hover={"layer": "layer", "images": "images"},
        reference=0.0,
    )  # fmt: skip
    columns = ["model", "layer", "locations", "images", "kernel", "matching"]
    columns += [f"{key}{end}" for key in MEASURES for end in ("", "_low", "_high")]
    measures = {f"{key}_difference": (title, True) for key, title in MEASURES.items()}
    counts = distinct(rows, "images")
    sections = [
        Section(
            "Correlations by rule",
            "The correlation is over all pairs of images, between the Jensen-Shannon divergence of the class "
            "probabilities and the similarity of the representations. It is negative if similar representations go "
            "with similar outputs; more negative is better.",
            [
                Chart(
                    "correlations", chart,
                    f"Correlation with its {level:.0%} interval from drawing images with replacement, because pairs "
                    "share images; as in Table 1 of Wald et al. 2024. Click on the legend, or tap it, to "
                    "single out a rule.",
                    result_table("correlations", result, columns),
                )
            ],
        ),
        differences_section(rows, result, measures, "model", menus, level),
    ]  # fmt: skip
    cells = [
        cell
        for title, of_model in shown.items()
        for one in of_model.facts.get("pairs", ())
        for cell in pair_cells(
            one, model=title, rule=rule_words(one["matching"]), kernel=kernel_title(one["kernel"])
        )
    ]  # fmt: skip
    if cells:
        density = density_chart(
            cells, "similarity of representations", "divergence of outputs (nats)",
            menus={"model": "model ", "rule": "compared by ", "kernel": "kernel "},
        )  # fmt: skip
        listed = "; ".join(f"{title}: {of_model.facts['count']:,}" for title, of_model in shown.items())
        sections.append(
            Section(
                "All pairs of images",
                f"Each cell counts pairs of images. Pairs per model: {listed}.",
                [
                    Chart(
                        "pairs", density, "Pairs of images by similarity of representations and divergence of outputs."
                    )
                ],
            )
        )
    setting = (
        f"All pairs of {' or '.join(f'{count:,}' for count in counts)} images of the set "
        f"{settings['images']['source']}; the last hidden layer of each classifier; {setting_of(settings, rows)}."
    )
    return Page(
        "Output similarity",
        "Does a classifier answer alike for images whose representations are similar, and does matching locations make "
        "similarity say more about its answers?",
        setting,
        semantic_answer(
            rows, ("pearson", "pearson_low", "pearson_high"), "pearson_difference",
            "the Pearson correlation with the divergence of outputs", level, lower_is_better=True,
            words=("more negative", "less negative"),
        ),
        sections,
        command="",
        provenance=cost_text(*(count * (count - 1) // 2 for count in counts)),
        notes=[TABLES_NOTE],
    )  # fmt: skip
