use crate::faults::{Abort, Faults, Finalize, Init, Operation};
use crate::run::{Data, Reduce};

#[test]
fn faults_are_read() {
    let faults =
        Faults::parse("init-hangs, op-fails@3=6,op-error@1=2,op-blocks@9,abort-hangs,once");
    let faults = faults.expect("a list");
    assert_eq!(faults.init, Some(Init::Hangs));
    assert_eq!(faults.abort, Some(Abort::Hangs));
    let by_number: Vec<(u64, Operation)> = faults.operations.into_iter().collect();
    let expected = [(1, Operation::Error(2)), (3, Operation::Fails(6)), (9, Operation::Blocks)];
    assert_eq!(by_number, expected);
    let closing = Faults::parse("group-blocks@2,finalize-hangs,destroy-hangs").expect("a list");
    assert_eq!((closing.grouped, closing.finalize), (Some(2), Some(Finalize::Hangs)));
    assert!(closing.destroy_hangs);
    let blocks = Faults::parse("init-blocks").expect("a list");
    assert_eq!(blocks.init, Some(Init::Blocks));
    assert_eq!(Faults::parse(""), Some(Faults::default()));
    for bad in [
        "op-fails=6",
        "op-fails@x=6",
        "init-hangs@1",
        "init-blocks=1",
        "what",
        "op-error@1",
        "group-blocks",
    ] {
        assert_eq!(Faults::parse(bad), None, "{bad}");
    }
}

#[test]
fn reductions_are_those_of_the_types() {
    let reduce = |data, op, parts: &[&[u8]]| {
        let parts: Vec<Vec<u8>> = parts.iter().map(|part| part.to_vec()).collect();
        crate::run::reduce(data, op, &parts)
    };
    let i64s = [i64::MAX.to_le_bytes(), 2i64.to_le_bytes()];
    let sum = reduce(Data::I64, Reduce::Sum, &[&i64s[0], &i64s[1]]);
    assert_eq!(sum, (i64::MIN + 1).to_le_bytes());
    let f32s = [1.5f32.to_le_bytes(), (-3.0f32).to_le_bytes()];
    assert_eq!(reduce(Data::F32, Reduce::Sum, &[&f32s[0], &f32s[1]]), (-1.5f32).to_le_bytes());
    assert_eq!(reduce(Data::F32, Reduce::Min, &[&f32s[0], &f32s[1]]), (-3.0f32).to_le_bytes());
    // 1 + 2^-8 has no bf16: it lies between two, and the even one is 1.
    let bf16s = [0x3f80u16.to_le_bytes(), 0x3b80u16.to_le_bytes()];
    assert_eq!(reduce(Data::Bf16, Reduce::Sum, &[&bf16s[0], &bf16s[1]]), 0x3f80u16.to_le_bytes());
    assert_eq!(reduce(Data::U8, Reduce::Max, &[&[3, 9], &[7, 1]]), [7, 9]);
}
