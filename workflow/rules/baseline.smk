# The stock router, watched on evaluation text and prompts.
from moe_routing.analysis.outputs import BASELINE
from moe_routing.analysis.text import text_dataset

TEXT = text_dataset(study.datasets)


rule baseline:
    input:
        model=f"{RESULTS}/model.json",
        data=expand(f"{RESULTS}/data/{{dataset}}.parquet", dataset=study.datasets),
    output:
        BASELINE.file_paths(RESULTS),
    log:
        f"{RESULTS}/logs/baseline.log",
    benchmark:
        f"{RESULTS}/benchmarks/baseline.tsv"
    conda:
        "../../envs/model.yaml"
    threads: study.resources.threads
    resources:
        mem_mb=lambda wildcards, attempt: study.resources.mem_mb * 2 ** (attempt - 1),
        runtime=study.resources.runtime,
        gpu=study.resources.gpu,
    params:
        settings=sections(
            study,
            "model",
            "analysis.baseline",
            "evaluation.window",
            "statistics.confidence",
            "statistics.resamples",
            "seed",
        ),
        results=subpath(input.model, parent=True),
    message:
        "Watching the stock router"
    shell:
        "python scripts/baseline.py --results {params.results:q} > {log:q} 2>&1"


rule plot_baseline:
    input:
        rules.baseline.output,
    output:
        png=[
            report(
                BASELINE.plot_path(RESULTS, plot, "png"),
                caption="../report/baseline.rst",
                category="Baseline",
                labels={"figure": plot.replace("_", " ")},
            )
            for plot in BASELINE.plots
        ],
        svg=[BASELINE.plot_path(RESULTS, plot, "svg") for plot in BASELINE.plots],
    log:
        f"{RESULTS}/logs/plot_baseline.log",
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        results=subpath(input[0], ancestor=2),
    message:
        "Drawing the figures of the baseline analysis"
    shell:
        "python scripts/baseline.py --results {params.results:q} --figures > {log:q} 2>&1"
