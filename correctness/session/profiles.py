"""Profiles of Hypothesis: the same examples in every run, or with --hypothesis-profile=thorough many new."""

from hypothesis import Phase, Verbosity, settings

QUICK = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    verbosity=Verbosity.quiet,  # the failure itself says on which problem
    phases=[phase for phase in Phase if phase is not Phase.explain],
)
settings.register_profile("ci", QUICK)
settings.register_profile(
    "thorough",
    QUICK,
    max_examples=2000,
    derandomize=False,
    database=settings().database,
    verbosity=Verbosity.normal,
    print_blob=True,
)
settings.load_profile("ci")
