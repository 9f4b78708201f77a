"""Elasticsearch over plain HTTP: what a cluster holds, its snapshots, and their way back.

What a real 6.8 answers, where its documentation does not say, is told in docs/elasticsearch.rst.
"""
