# From cells to one table, and from controls and levers to others.


rule collect:
    input:
        cells=expand(
            f"{RESULTS}/cells/{{strategy}}/{{dataset}}.json",
            strategy=study.scored,
            dataset=study.datasets,
        ),
    output:
        cells=f"{RESULTS}/comparison/full_routing_results.csv",
        controls=f"{RESULTS}/comparison/controls.csv",
        levers=f"{RESULTS}/comparison/levers.csv",
        metrics=f"{RESULTS}/comparison/all_metrics.csv",
    log:
        f"{RESULTS}/logs/collect.log",
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        settings=sections(study, "strategies", "controls", "levers"),
        results=subpath(output.cells, ancestor=2),
    message:
        "Collecting the cells"
    shell:
        "python scripts/collect.py --results {params.results:q} 2> {log:q}"
