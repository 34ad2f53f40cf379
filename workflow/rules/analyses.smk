# The analyses beside the cells: baseline, BH, validity, ablation, consequence.
from moe_routing.analysis.outputs import ANALYSES
from moe_routing.workflow import analysis_inputs

for analysis in ANALYSES:

    rule:
        name:
            analysis.name
        input:
            analysis_inputs(study, analysis, RESULTS),
        output:
            analysis.file_paths(RESULTS),
        log:
            f"{RESULTS}/logs/{analysis.name}.log",
        benchmark:
            f"{RESULTS}/benchmarks/{analysis.name}.tsv"
        # The longest jobs that nothing can be split off, so that they do not start last.
        priority: 1
        conda:
            MODEL_ENVIRONMENT
        threads: study.resources.threads if analysis.runs_model else 1
        resources:
            mem_mb=doubled(max(study.resources.mem_mb, analysis.mem_mb)),
            runtime=doubled(study.resources.runtime),
            gpu=study.resources.gpu * analysis.runs_model,
        params:
            settings=sections(study, *analysis.settings),
            analysis=analysis.name,
            results=subpath(output[0], ancestor=2),
        message:
            analysis.title
        shell:
            'python "$SCRIPTS/analyse.py" {params.analysis:q} --results {params.results:q} '
            "> {log:q} 2>&1"
