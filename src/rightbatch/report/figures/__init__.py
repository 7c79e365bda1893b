"""Thin Plotly renderers: each draws the data of one figure, in one shared style."""
