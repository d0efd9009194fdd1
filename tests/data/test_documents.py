import numpy as np

from tests.data.contents import contents
from umv2.data.documents import DocumentSubset, InMemoryDocuments


def test_in_memory_documents_are_read_by_slice() -> None:
    documents = InMemoryDocuments(
        np.array([1, 2, 3, 4, 5, 6], np.uint8), np.array([2, 0, 4]), np.zeros(3, np.uint64)
    )
    assert contents(documents) == [[1, 2], [], [3, 4, 5, 6]]
    assert documents.read(2, 1, 3).tolist() == [4, 5]
    assert contents(DocumentSubset(documents, np.array([2, 0]))) == [[3, 4, 5, 6], [1, 2]]
