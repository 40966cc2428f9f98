"""`flashtune report`: the searches on record as one page, to be looked at in a browser.

`content` gathers what is to be said, `figure` draws it with Plotly, `page` makes the page.
"""
