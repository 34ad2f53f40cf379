# Beside the study's own numbers: those of its replications, which no run makes again.
from moe_routing.analysis.outputs import VALIDITY


rule replications:
    input:
        *study.replications,
        model=f"{RESULTS}/model.json",
        statistics=expand(f"{RESULTS}/statistics/{{table}}.csv", table=[*TABLES, "columns"]),
        validity=VALIDITY.file_paths(RESULTS),
    output:
        f"{RESULTS}/replications.csv",
    log:
        f"{RESULTS}/logs/replications.log",
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        settings=sections(study, "replications"),
        results=subpath(output[0], parent=True),
    message:
        "Comparing the study with its replications"
    shell:
        'python "$SCRIPTS/replications.py" --results {params.results:q} > {log:q} 2>&1'
