# Figures of the comparison.
from moe_routing.reporting.article_figures import planned


rule plot_comparison:
    input:
        model=f"{RESULTS}/model.json",
        cells=rules.collect.output,
        statistics=rules.statistics.output,
    output:
        png=[
            report(
                f"{RESULTS}/comparison/comparison_plots/{plot}.png",
                caption=f"../report/{plot}.rst",
                category="Comparison",
                labels={"figure": plot.replace("_", " ")},
            )
            for plot in planned(study)
        ],
        svg=[f"{RESULTS}/comparison/comparison_plots/{plot}.svg" for plot in planned(study)],
    log:
        f"{RESULTS}/logs/plot_comparison.log",
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        results=subpath(input.model, parent=True),
    message:
        "Drawing the comparison"
    shell:
        "python scripts/figures.py --results {params.results:q} 2> {log:q}"
