# BH over max_k, alpha and null, beside top-k.
from moe_routing.analysis.outputs import BH


rule bh_routing:
    input:
        model=f"{RESULTS}/model.json",
        text=f"{RESULTS}/data/{TEXT}.parquet",
        sample=f"{RESULTS}/calibration/router_logits.safetensors",
        nulls=expand(
            f"{RESULTS}/calibration/nulls/{{null}}.safetensors",
            null=study.analysis.bh.nulls or study.calibration.nulls,
        ),
    output:
        BH.file_paths(RESULTS),
    log:
        f"{RESULTS}/logs/bh_routing.log",
    benchmark:
        f"{RESULTS}/benchmarks/bh_routing.tsv"
    conda:
        "../../envs/model.yaml"
    threads: study.resources.threads
    resources:
        mem_mb=lambda wildcards, attempt: study.resources.mem_mb * 2 ** (attempt - 1),
        runtime=study.resources.runtime,
        gpu=study.resources.gpu,
    params:
        settings=sections(study, "model", "analysis.bh", "evaluation", "statistics", "seed"),
        results=subpath(input.model, parent=True),
    message:
        "Routing by BH over max_k, alpha and null"
    shell:
        "python scripts/bh_routing.py --results {params.results:q} > {log:q} 2>&1"


rule plot_bh_routing:
    input:
        rules.bh_routing.output,
    output:
        png=[
            report(
                BH.plot_path(RESULTS, plot, "png"),
                caption="../report/bh_routing.rst",
                category="BH routing",
                labels={"figure": plot.replace("_", " ")},
            )
            for plot in BH.plots
        ],
        svg=[BH.plot_path(RESULTS, plot, "svg") for plot in BH.plots],
    log:
        f"{RESULTS}/logs/plot_bh_routing.log",
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        results=subpath(input[0], ancestor=2),
    message:
        "Drawing the figures of the BH analysis"
    shell:
        "python scripts/bh_routing.py --results {params.results:q} --figures > {log:q} 2>&1"
