use super::{HEADER_BYTES, decode_header, encode_header};
use crate::{OpDescription, OpKind};

#[test]
fn headers_come_back_as_they_were() {
    let sums = [OpKind::AllReduceI64, OpKind::AllReduceI32, OpKind::AllReduceF32];
    let others = [OpKind::Broadcast, OpKind::Barrier, OpKind::AllReduceI64There];
    let kinds = sums.into_iter().chain(others);
    for kind in kinds {
        let op = OpDescription { op_seq: u64::MAX - 1, kind, root: 513, bytes: 1 << 40 };
        assert_eq!(decode_header(&encode_header(&op)), Some(op));
    }
    assert_eq!(decode_header(&[0; HEADER_BYTES]), None);
}

#[test]
fn descriptions_name_what_differs() {
    let op = OpDescription { op_seq: 7, kind: OpKind::AllReduceI64, root: 0, bytes: 80 };
    assert_eq!(op.to_string(), "operation 7, all_reduce_i64 of 80 bytes");
    let op = OpDescription { kind: OpKind::Broadcast, root: 2, ..op };
    assert_eq!(op.to_string(), "operation 7, broadcast of 80 bytes from rank 2");
}
