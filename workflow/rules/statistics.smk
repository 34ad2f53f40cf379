# Paired tests of every strategy against the baseline, and what goes with them.


rule statistics:
    input:
        cells=rules.collect.output.cells,
        tables=expand(
            f"{RESULTS}/cells/{{strategy}}/{{dataset}}.parquet",
            strategy=study.strategies,
            dataset=study.datasets,
        ),
    output:
        expand(f"{RESULTS}/statistics/{{table}}.csv", table=[*TABLES, "columns"]),
    log:
        f"{RESULTS}/logs/statistics.log",
    benchmark:
        f"{RESULTS}/benchmarks/statistics.tsv"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        settings=sections(study, "statistics", "seed"),
        results=subpath(output[0], ancestor=2),
    message:
        "Testing every strategy against {study.statistics.baseline}"
    shell:
        "python scripts/compute_statistics.py --results {params.results} 2> {log}"
