# Figures of the comparison and of the analyses.
from moe_routing.analysis.outputs import ANALYSES
from moe_routing.reporting.article_figures import COMPARISON, captions_in, planned


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
        captions=captions_in(COMPARISON),  # for the report
    message:
        "Drawing the comparison"
    shell:
        'python "$SCRIPTS/figures.py" --results {params.results:q} 2> {log:q}'


for analysis in ANALYSES:

    rule:
        name:
            f"plot_{analysis.name}"
        input:
            analysis.file_paths(RESULTS),
        output:
            png=[
                report(
                    path,
                    caption=f"../report/{analysis.name}.rst",
                    category=analysis.category,
                    labels={"figure": Path(path).stem.replace("_", " ")},
                )
                for path in analysis.plot_paths(RESULTS, "png")
            ],
            svg=analysis.plot_paths(RESULTS, "svg"),
        log:
            f"{RESULTS}/logs/plot_{analysis.name}.log",
        conda:
            "../../envs/analysis.yaml"
        threads: 1
        resources:
            mem_mb=2000,
            runtime=10,
        params:
            analysis=analysis.name,
            captions=captions_in(f"{analysis.name}/{analysis.name}_plots"),  # for the report
            results=subpath(input[0], ancestor=2),
        message:
            f"Drawing the figures: {analysis.category}"
        shell:
            'python "$SCRIPTS/analyse.py" {params.analysis:q} --results {params.results:q} --figures '
            "> {log:q} 2>&1"
