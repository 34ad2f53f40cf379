# What leaving a selected expert out does to the loss.
from moe_routing.analysis.outputs import ABLATION


rule ablation:
    input:
        model=f"{RESULTS}/model.json",
        text=f"{RESULTS}/data/{TEXT}.parquet",
        sample=f"{RESULTS}/calibration/router_logits.safetensors",
        nulls=expand(
            f"{RESULTS}/calibration/nulls/{{null}}.safetensors",
            null=study.analysis.ablation.nulls or study.calibration.nulls,
        ),
    output:
        ABLATION.file_paths(RESULTS),
    log:
        f"{RESULTS}/logs/ablation.log",
    benchmark:
        f"{RESULTS}/benchmarks/ablation.tsv"
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
            "analysis.ablation",
            "evaluation.window",
            "statistics.confidence",
            "statistics.resamples",
            "seed",
        ),
        results=subpath(input.model, parent=True),
    message:
        "Leaving selected experts out, one at a time"
    shell:
        "python scripts/ablation.py --results {params.results:q} > {log:q} 2>&1"


rule plot_ablation:
    input:
        rules.ablation.output,
    output:
        png=[
            report(
                ABLATION.plot_path(RESULTS, plot, "png"),
                caption="../report/ablation.rst",
                category="Ablation",
                labels={"figure": plot.replace("_", " ")},
            )
            for plot in ABLATION.plots
        ],
        svg=[ABLATION.plot_path(RESULTS, plot, "svg") for plot in ABLATION.plots],
    log:
        f"{RESULTS}/logs/plot_ablation.log",
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        results=subpath(input[0], ancestor=2),
    message:
        "Drawing the figures of the ablation"
    shell:
        "python scripts/ablation.py --results {params.results:q} --figures > {log:q} 2>&1"
