# From cells to one table, and from controls, levers and budgets to others.
from moe_routing.config.cells import budget_path
from moe_routing.workflow import in_results


rule collect:
    input:
        compared_cells("parquet", "json"),
        budgets=in_results(RESULTS, [f"{budget_path(name)}.json" for name in study.budgeted]),
    output:
        cells=f"{RESULTS}/comparison/full_routing_results.csv",
        controls=f"{RESULTS}/comparison/controls.csv",
        levers=f"{RESULTS}/comparison/levers.csv",
        budgets=f"{RESULTS}/comparison/budgets.csv",
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
            "statistics.primary",
            "statistics.sequence",
            "statistics.confidence",
            "statistics.resamples",
        ),
        results=subpath(output.cells, ancestor=2),
    message:
        "Collecting the cells"
    # Shown as well as logged: it warns where cells were not made alike.
    shell:
        'python "$SCRIPTS/collect.py" --results {params.results:q} 2>&1 | tee {log:q}'
