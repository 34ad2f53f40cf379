# How many experts does a token need, and does Benjamini-Hochberg routing beat a fixed top-8?
#
#   snakemake --cores all                                             the default study
#   snakemake --cores all --configfile config/olmoe-1b-7b.yaml        the study of OLMoE-1B-7B
#   snakemake pretrain --cores all --configfile config/pretrain.yaml  train the embedded model
from snakemake.utils import min_version

from moe_routing.files import first_existing

min_version("9.0")


# A config file given on the command line replaces the default one; it does not extend it.
if not workflow.overwrite_configfiles:

    configfile: first_existing("config/config.yaml", f"{workflow.basedir}/config/config.yaml")


if "sources" in config:

    include: "workflow/rules/pretrain.smk"
    include: "workflow/rules/pretrain_card.smk"

    # A target of an included file would not be the default one.
    rule pretrain:
        default_target: True
        input:
            f"{RUN}/model/README.md",
        message:
            f"The trained model is complete: {RUN}/model"

else:

    include: "workflow/rules/common.smk"

    if not FINISHED_ELSEWHERE:

        include: "workflow/rules/fetch.smk"
        include: "workflow/rules/data.smk"
        include: "workflow/rules/calibrate.smk"
        include: "workflow/rules/certify.smk"
        include: "workflow/rules/evaluate.smk"
        include: "workflow/rules/held_out.smk"
        include: "workflow/rules/analyses.smk"
        include: "workflow/rules/efficiency.smk"
        include: "workflow/rules/replications.smk"
    include: "workflow/rules/compare.smk"
    include: "workflow/rules/statistics.smk"
    include: "workflow/rules/figures.smk"
    include: "workflow/rules/report.smk"

    rule all:
        default_target: True
        input:
            f"{RESULTS}/comparison/full_routing_results.csv",
            rules.statistics.output,
            rules.comparison_report.output,
            rules.render_article.output,
        message:
            f"The study is complete: {RESULTS}"
