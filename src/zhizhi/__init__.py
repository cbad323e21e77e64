"""Zhizhi (致知): tested implementations, one room an article.

Wings import downhill only: python < deep_learning < reinforcement_learning < large_models <
generative_models. Every public object has one address, its module.
"""
