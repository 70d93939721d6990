"""Report pages: one HTML file that shows the result of a run, and opens without a network.

Begin with `page.py`, the data of a page. `write.py` turns it into HTML; `default.py` makes the page of studies that
have none of their own. Nothing here computes: a run stores what its page shows.
"""
