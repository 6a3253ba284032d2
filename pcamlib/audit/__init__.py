"""The audit: what is wrong with a data set, how sure that is, which rows it concerns and what to do."""
