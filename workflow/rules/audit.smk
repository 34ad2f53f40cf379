# What leaving a selected expert out does to the loss.
from moe_routing.analysis.outputs import AUDIT


rule audit:
    input:
        model=f"{RESULTS}/model.json",
        text=f"{RESULTS}/data/{TEXT}.parquet",
        sample=f"{RESULTS}/calibration/router_logits.safetensors",
        nulls=expand(
            f"{RESULTS}/calibration/nulls/{{null}}.safetensors",
            null=study.analysis.audit.nulls or study.calibration.nulls,
        ),
    output:
        AUDIT.file_paths(RESULTS),
    log:
        f"{RESULTS}/logs/audit.log",
    benchmark:
        f"{RESULTS}/benchmarks/audit.tsv"
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
            "analysis.audit",
            "evaluation.window",
            "statistics.confidence",
            "statistics.resamples",
            "seed",
        ),
        results=subpath(input.model, parent=True),
    message:
        "Leaving selected experts out, one at a time"
    shell:
        "python scripts/audit.py --results {params.results:q} > {log:q} 2>&1"


rule plot_audit:
    input:
        rules.audit.output,
    output:
        png=[
            report(
                AUDIT.plot_path(RESULTS, plot, "png"),
                caption="../report/audit.rst",
                category="Audit",
                labels={"figure": plot.replace("_", " ")},
            )
            for plot in AUDIT.plots
        ],
        svg=[AUDIT.plot_path(RESULTS, plot, "svg") for plot in AUDIT.plots],
    log:
        f"{RESULTS}/logs/plot_audit.log",
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        results=subpath(input[0], ancestor=2),
    message:
        "Drawing the figures of the audit"
    shell:
        "python scripts/audit.py --results {params.results:q} --figures > {log:q} 2>&1"
