# Paired tests: every strategy against the baseline, every control against what it takes apart, every
# rule at its budget against a fixed number of experts, the baseline against itself; and measured time.
from moe_routing.config.cells import TIMING_FILE, UNIQUE_FILE


rule statistics:
    input:
        cells=rules.collect.output.cells,
        controls=rules.collect.output.controls,
        levers=rules.collect.output.levers,
        budgets=rules.collect.output.budgets,
        fits=rules.collect.input.budgets,
        tables=compared_cells("parquet"),
        numerics=expand(
            f"{RESULTS}/numerics/{{arm}}/{{dataset}}.parquet",
            arm=[arm.name for arm in study.numerics],
            dataset=study.datasets,
        ),
        efficiency=[f"{RESULTS}/{file}" for file in (TIMING_FILE, UNIQUE_FILE)],
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
        settings=sections(
            study, "statistics", "seed", "strategies", "controls", "levers", "budgets", "numerics"
        ),
        results=subpath(output[0], ancestor=2),
    message:
        f"Testing every strategy against {study.statistics.baseline}"
    shell:
        'python "$SCRIPTS/compute_statistics.py" --results {params.results:q} 2> {log:q}'
