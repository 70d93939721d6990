"""The report page of sweeps: what a run stores for it, and the page.

Begin with `page.py`. `recording.py` runs at the end of a sweep and writes what `shown.py` describes; `cka_grids.py`,
`rsm_views.py` and `curves.py` make the charts.
"""
