"""The paper's comparisons: rival objectives, the toy world, evaluation by people, and the report."""
