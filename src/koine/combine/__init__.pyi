from .moe.add_expert import add_expert as add_expert
from .moe.add_expert import remove_expert as remove_expert
from .moe.domain_embeddings import domain_embedding as domain_embedding
from .moe.domain_embeddings import fit_encoder as fit_encoder
from .moe.domain_embeddings import load_encoder as load_encoder
from .moe.upcycle import upcycle_bam as upcycle_bam
from .moe.upcycle import upcycle_btx as upcycle_btx
from .moe.upcycle import upcycle_nexus as upcycle_nexus
