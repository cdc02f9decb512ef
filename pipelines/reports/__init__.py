"""What reports say, of a run and of a table of runs, and the Markdown, HTML and figures that they are made of."""
