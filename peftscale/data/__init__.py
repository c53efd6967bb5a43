"""Data: rows of a data set -> tokenised examples -> the order of training -> passes of each rank -> scores.

Nothing here knows a model; of the base it is handed the tokenizer and the number of tokens that fit.
"""
