//! Files that are not what they say, and folders that leave a choice.

use super::*;

/// Writes a file with this header and so many bytes of data.
fn raw(path: &Path, header: &str, n_bytes: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + n_bytes, 0);
    std::fs::write(path, bytes).unwrap();
}

/// Opens `name` of a folder and returns why not, without the folder's own path.
fn refused(folder: &Path, name: &str) -> String {
    let error = Weights::open(&folder.join(name)).map(|_| ()).unwrap_err();
    chain(&error).replace(&format!("{}", folder.display()), "DIR")
}

#[test]
fn headers_are_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let one = |tensor: &str| format!("{{\"a\":{tensor}}}");
    let two = |offsets: &str| {
        let a = tensor("F32", "[2]", "[0,8]");
        format!(r#"{{"a":{a},"b":{}}}"#, tensor("F32", "[2]", offsets))
    };
    let rows: Vec<(String, usize, &str)> = vec![
        (one(&tensor("F32", "[2]", "[0,8]")), 7, "`a` lies at 0..8 of 7 bytes"),
        (one(&tensor("F32", "[2]", "[0,8]")), 9, "its tensors end 1 bytes before the file"),
        (one(&tensor("F32", "[3]", "[0,8]")), 8, "`a` is F32 [3] in 8 bytes"),
        (
            one(&tensor("F32", "[4294967296,4294967296]", "[0,0]")),
            0,
            "`a` is F32 [4294967296, 4294967296] in 0 bytes",
        ),
        (one(&tensor("F32", "[2]", "[8,0]")), 8, "`a` lies at 8..0 of 8 bytes"),
        (one(&tensor("F32", "[-2]", "[0,8]")), 8, "`a` has no shape"),
        (one(&tensor("F32", "[2]", "[0]")), 8, "`a` has no pair of offsets"),
        (one(r#"{"shape":[2],"data_offsets":[0,8]}"#), 8, "`a` has no dtype"),
        (one("[]"), 0, "`a` is not an object"),
        (two("[4,12]"), 12, "`b` overlaps another tensor"),
        (two("[12,20]"), 20, "`b` follows a hole"),
        (two("[0,8]"), 8, "`b` overlaps another tensor"),
        (r#"{"__metadata__":{"a":1}}"#.to_string(), 0, "metadata `a` is not a string"),
        ("[]".to_string(), 0, "its header is not an object"),
    ];
    for (header, n_bytes, want) in rows {
        raw(&path, &header, n_bytes);
        let want = format!("`DIR/x.safetensors` is not a sound safetensors file: {want}");
        assert_eq!(refused(folder.path(), "x.safetensors"), want, "{header}");
    }
    let twice = format!(r#"{{"a":{t},"a":{t}}}"#, t = tensor("F32", "[2]", "[0,8]"));
    raw(&path, &twice, 8);
    let text = refused(folder.path(), "x.safetensors");
    assert!(text.contains("cannot be understood: key \"a\" appears twice"), "{text}");
    raw(&path, "{\"a\":", 0);
    assert!(refused(folder.path(), "x.safetensors").contains("cannot be understood: EOF"));
}

#[test]
fn lengths_are_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    for (bytes, want) in [
        (vec![1, 2], "it has 2 bytes"),
        (vec![0xff; 16], "its header would have 18446744073709551615 bytes, and it has 16"),
        (9u64.to_le_bytes().repeat(2), "its header would have 9 bytes, and it has 16"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let want = format!("`DIR/x.safetensors` is not a sound safetensors file: {want}");
        assert_eq!(refused(folder.path(), "x.safetensors"), want);
    }
    // A sparse file that is as large as it says.
    let long = tensor_file::HEADER_BYTES_MAX + 1;
    std::fs::write(&path, long.to_le_bytes()).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(long + 8).unwrap();
    let text = refused(folder.path(), "x.safetensors");
    assert!(text.contains("its header would have 8388609 bytes"), "{text}");
}

#[test]
fn pickles_are_refused_with_the_line_that_converts_them() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("mae.pth"), b"PK\x03\x04 and more").unwrap();
    assert_eq!(
        refused(folder.path(), "mae.pth"),
        r#"`DIR/mae.pth` is a pickle, which is not read because that would run what is in it. "#
            .to_string()
            + "This line of Python converts it:\n  "
            + "python3 -c 'import argparse, torch, safetensors.torch as s; "
            + "torch.serialization.add_safe_globals([argparse.Namespace]); "
            + r#"d = torch.load("DIR/mae.pth", map_location="cpu", weights_only=True); "#
            + r#"d = d.get("model", d); "#
            + r#"s.save_file({k: v.contiguous().clone() for k, v in d.items()}, "#
            + r#""DIR/mae.safetensors", metadata={"format": "pt"})'"#
    );
    // A folder that has nothing else, and a file under another name.
    assert!(refused(folder.path(), "").contains("mae.pth` is a pickle"));
    std::fs::write(folder.path().join("x.safetensors"), b"\x80\x02pickled bytes").unwrap();
    assert!(refused(folder.path(), "x.safetensors").contains("x.safetensors` is a pickle"));
    std::fs::write(folder.path().join("pytorch_model.bin"), b"PK\x03\x04").unwrap();
    assert!(refused(folder.path(), "pytorch_model.bin").contains("is a pickle"));
}

#[test]
fn folders_that_leave_a_choice_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str| write(&folder.path().join(name), &renamed(&state(), whole));
    assert_eq!(refused(folder.path(), ""), "`DIR/` has no .safetensors file");
    put("a.safetensors");
    assert!(read_all(folder.path()).is_ok());
    put("b.safetensors");
    let want = "`DIR/` has a.safetensors and b.safetensors: name the file to import";
    assert_eq!(refused(folder.path(), ""), want);
    put("model.safetensors");
    assert!(read_all(folder.path()).is_ok());
    std::fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
    let want = "`DIR/` has model.safetensors and model.safetensors.index.json: name the file to \
                import";
    assert_eq!(refused(folder.path(), ""), want);
    assert!(refused(folder.path(), "nowhere").contains("failed to inspect `DIR/nowhere`"));
    std::fs::create_dir(folder.path().join("d.safetensors")).unwrap();
    let want = "`DIR/d.safetensors` has no .safetensors file";
    assert_eq!(refused(folder.path(), "d.safetensors"), want);
}

#[test]
fn an_index_leads_to_its_own_files_only() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    let start = "the index `DIR/model.safetensors.index.json` is not sound: ";
    let with = |document: &str| {
        std::fs::write(&index, document).unwrap();
        refused(folder.path(), "").replace("DIR//", "DIR/")
    };
    assert_eq!(with("{}"), format!("{start}it has no weight_map"));
    for name in [
        "../x.safetensors",
        "/x.safetensors",
        "a/x.safetensors",
        "x\\y.safetensors",
        ".x.safetensors",
        "x.bin",
        "",
    ] {
        let document = json!({ "weight_map": { "a": name } }).to_string();
        let shown = json!(name).to_string();
        let want = format!("{start}{} is not a name of a file beside it", shown.escape_debug());
        assert_eq!(with(&document), want);
    }
    assert!(with(r#"{"weight_map": {"a": 3}}"#).ends_with("3 is not a name of a file beside it"));
    let twice = r#"{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}"#;
    assert!(with(twice).contains("cannot be understood: key \"a\" appears twice"));
    let one = r#"{"weight_map": {"a": "x.safetensors"}}"#;
    assert!(with(one).contains("failed to inspect `DIR/x.safetensors`"));
    write(&folder.path().join("x.safetensors"), &[Wire::zeros("b", &[1])]);
    assert_eq!(with(one), format!("{start}`x.safetensors` does not have `a`"));
    write(&folder.path().join("x.safetensors"), &[Wire::zeros("a", &[1]), Wire::zeros("b", &[1])]);
    assert_eq!(with(one), format!("{start}`x.safetensors` has `b`, which it does not say"));
    // The same tensor in two files, one of which the index names.
    write(&folder.path().join("y.safetensors"), &[Wire::zeros("a", &[1]), Wire::zeros("c", &[1])]);
    let x = "x.safetensors";
    let pair = json!({ "weight_map": { "a": x, "b": x, "c": "y.safetensors" } }).to_string();
    assert_eq!(with(&pair), format!("{start}`y.safetensors` has `a`, which it does not say"));
}

#[test]
fn files_of_different_checkpoints_are_not_mixed() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, tensor: &str, manifest: &str| {
        let tensors =
            [HeaderTensor { name: tensor.to_string(), dtype: "F32", shape: vec![1], bytes: 4 }];
        let mut bytes = render(&[("format", "pt"), ("lacuna.manifest", manifest)], &tensors);
        bytes.extend([0; 4]);
        std::fs::write(folder.path().join(name), bytes).unwrap();
    };
    file("x.safetensors", "a", "blake3:1");
    file("y.safetensors", "b", "blake3:2");
    let document = r#"{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}"#;
    std::fs::write(folder.path().join("model.safetensors.index.json"), document).unwrap();
    let text = refused(folder.path(), "");
    assert!(text.ends_with("its files were exported from different checkpoints"), "{text}");
    file("y.safetensors", "b", "blake3:1");
    assert!(Weights::open(folder.path()).is_ok());
}

#[test]
fn all_differences_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let mut tensors = renamed(&state(), v5);
    tensors.retain(|t| t.name != "vit.layers.1.attention.o_proj.bias");
    for tensor in &mut tensors {
        match tensor.name.as_str() {
            "vit.layers.0.attention.v_proj.weight" => tensor.shape = vec![4, 16],
            "decoder.decoder_norm.bias" => {
                (tensor.dtype, tensor.bytes) = ("I64", vec![0; 64]);
            }
            _ => {}
        }
    }
    tensors.push(Wire::zeros("vit.layers.7.mlp.fc1.bias", &[32]));
    tensors.push(Wire::zeros("vit.surprise", &[1]));
    write(&path, &tensors);
    assert_eq!(
        chain(&read_all(&path).unwrap_err()),
        "the file does not fit the model of the spec:\n  \
         `decoder.decoder_norm.bias` is I64, not F32, BF16, F16\n  \
         `vit.layers.0.attention.v_proj.weight` [4, 16] is not [8, 8], our last third of \
         `blocks.0.attn.qkv.weight`\n  \
         `vit.layers.7.mlp.fc1.bias` [32] is not in this model, our `blocks.7.mlp.fc1.bias`\n  \
         `vit.surprise` [1] is not of a masked autoencoder\n  \
         `vit.layers.1.attention.o_proj.bias` is missing, our `blocks.1.attn.proj.bias`"
    );
    write(&path, &[Wire::zeros("weight", &[1])]);
    assert_eq!(
        chain(&read_all(&path).unwrap_err()),
        "the file cannot be imported: no key is one of a masked autoencoder's in the layouts mae, \
         timm and hf; the file has `weight`"
    );
}

#[test]
fn a_digest_tells_weights_apart() {
    let folder = tempfile::tempdir().unwrap();
    let digest = |name: &str, header: &str, last: u8| {
        let path = folder.path().join(name);
        raw(&path, header, 7);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.push(last);
        std::fs::write(&path, bytes).unwrap();
        Weights::open(&path).unwrap().digest().unwrap()
    };
    let of = |name: &str, dtype: &str| {
        format!(r#"{{"{name}":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,8]}}}}"#)
    };
    let (plain, first) = (of("a", "F32"), digest("x.safetensors", &of("a", "F32"), 0));
    assert_eq!(first, digest("y.safetensors", &plain, 0), "its own name does not matter");
    let spaced = plain.replace(":[2]", ": [2]");
    assert_eq!(first, digest("x.safetensors", &spaced, 0), "nor is how it is written");
    let told = plain.replacen('{', r#"{"__metadata__":{"heads":"2"},"#, 1);
    for (header, last) in [(&plain, 1), (&of("b", "F32"), 0), (&of("a", "I32"), 0), (&told, 0)] {
        assert_ne!(first, digest("x.safetensors", header, last), "{header} {last}");
    }
}
