"""`flashtune report`: the recorded searches as one page for a browser.

`content` gathers the data, `figure` draws it with Plotly, `page` makes the page.
"""
