"""One module for each claim of the papers, each with a function `measure` that returns Findings; see docs/claims."""
