# From cells to one table, and from controls, levers and budgets to others.


rule collect:
    input:
        expand(
            f"{RESULTS}/cells/{{strategy}}/{{dataset}}.{{kind}}",
            strategy=study.scored,
            dataset=study.datasets,
            kind=["parquet", "json"],
        ),
    output:
        cells=f"{RESULTS}/comparison/full_routing_results.csv",
        controls=f"{RESULTS}/comparison/controls.csv",
        levers=f"{RESULTS}/comparison/levers.csv",
        metrics=f"{RESULTS}/comparison/all_metrics.csv",
        provenance=f"{RESULTS}/comparison/provenance.csv",
    log:
        f"{RESULTS}/logs/collect.log",
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        settings=sections(
            study,
            "strategies",
            "controls",
            "levers",
            "budgets",
            "seed",
            "statistics.confidence",
            "statistics.resamples",
        ),
        results=subpath(output.cells, ancestor=2),
    message:
        "Collecting the cells"
    # Shown as well as logged: it warns where cells were not made alike.
    shell:
        'python "$SCRIPTS/collect.py" --results {params.results:q} 2>&1 | tee {log:q}'
