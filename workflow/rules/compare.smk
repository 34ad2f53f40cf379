# From cells to one table.


rule collect:
    input:
        config=ancient(f"{RESULTS}/config.yaml"),
        cells=expand(
            f"{RESULTS}/cells/{{strategy}}/{{dataset}}.json",
            strategy=study.strategies,
            dataset=study.datasets,
        ),
    output:
        cells=f"{RESULTS}/comparison/full_routing_results.csv",
        metrics=f"{RESULTS}/comparison/all_metrics.csv",
    params:
        results=RESULTS,
    log:
        f"{RESULTS}/logs/collect.log",
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    conda:
        "../../envs/analysis.yaml"
    message:
        "Collecting the cells"
    shell:
        "python scripts/collect.py --results {params.results} 2> {log}"
