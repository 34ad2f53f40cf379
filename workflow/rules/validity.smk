# Are the p-values uniform where H0 holds, and do procedures keep their rates?
from moe_routing.analysis.outputs import VALIDITY


rule validity:
    input:
        sample=f"{RESULTS}/calibration/router_logits.safetensors",
        text=f"{RESULTS}/baseline/router_logits.safetensors",
    output:
        VALIDITY.file_paths(RESULTS),
    log:
        f"{RESULTS}/logs/validity.log",
    benchmark:
        f"{RESULTS}/benchmarks/validity.tsv"
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 6000 * 2 ** (attempt - 1),
        runtime=60,
    params:
        settings=sections(study, "analysis.validity", "statistics.confidence", "seed"),
        results=subpath(input[0], ancestor=2),
    message:
        "Examining nulls and procedures"
    shell:
        "python scripts/validity.py --results {params.results:q} > {log:q} 2>&1"


rule plot_validity:
    input:
        rules.validity.output,
    output:
        png=[
            report(
                VALIDITY.plot_path(RESULTS, plot, "png"),
                caption="../report/validity.rst",
                category="Validity",
                labels={"figure": plot.replace("_", " ")},
            )
            for plot in VALIDITY.plots
        ],
        svg=[VALIDITY.plot_path(RESULTS, plot, "svg") for plot in VALIDITY.plots],
    log:
        f"{RESULTS}/logs/plot_validity.log",
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        results=subpath(input[0], ancestor=2),
    message:
        "Drawing the figures of the validity page"
    shell:
        "python scripts/validity.py --results {params.results:q} --figures > {log:q} 2>&1"
