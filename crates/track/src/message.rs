//! TensorBoard's messages, as far as they are written or read here.
//!
//! Names and numbers are those of tensorflow/tensorboard, `tensorboard/compat/proto/`: event.proto,
//! summary.proto, tensor.proto, tensor_shape.proto. What is a oneof there is a set of optional
//! fields here, which is the same on the wire.

/// `SessionLog.status` of a writer that begins: readers forget steps from its own on.
pub const SESSION_START: i32 = 1;

/// `DataType.DT_STRING`.
pub(crate) const TYPE_STRING: i32 = 7;

/// `DataClass.DATA_CLASS_TENSOR`.
pub(crate) const CLASS_TENSOR: i32 = 2;

/// One entry of an event file.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Event {
    /// Seconds since the Unix epoch.
    #[prost(double, tag = "1")]
    pub wall_time: f64,
    /// Step.
    #[prost(int64, tag = "2")]
    pub step: i64,
    /// Only in the first event of a file.
    #[prost(string, optional, tag = "3")]
    pub file_version: Option<String>,
    /// Values.
    #[prost(message, optional, tag = "5")]
    pub summary: Option<Summary>,
    /// A writer that begins or ends.
    #[prost(message, optional, tag = "7")]
    pub session_log: Option<SessionLog>,
    /// Number of the record that it was made of, 0 for none. Not TensorBoard's, so with a number
    /// that its own fields will not reach; its readers skip it.
    #[prost(uint64, tag = "1001")]
    pub seq: u64,
}

/// A writer that begins or ends.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SessionLog {
    /// [`SESSION_START`], or a value that is not written here.
    #[prost(int32, tag = "1")]
    pub status: i32,
}

/// Values of one step.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Summary {
    /// Values.
    #[prost(message, repeated, tag = "1")]
    pub value: Vec<Value>,
}

/// One value: of `simple_value`, `image` and `tensor` one is there.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Value {
    /// Name of its curve, or row of pictures.
    #[prost(string, tag = "1")]
    pub tag: String,
    /// A scalar.
    #[prost(float, optional, tag = "2")]
    pub simple_value: Option<f32>,
    /// A picture.
    #[prost(message, optional, tag = "4")]
    pub image: Option<Image>,
    /// A text.
    #[prost(message, optional, tag = "8")]
    pub tensor: Option<Tensor>,
    /// Who shows it, where the value does not say so by itself.
    #[prost(message, optional, tag = "9")]
    pub metadata: Option<SummaryMetadata>,
}

/// A picture.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Image {
    /// Pixels.
    #[prost(int32, tag = "1")]
    pub height: i32,
    /// Pixels.
    #[prost(int32, tag = "2")]
    pub width: i32,
    /// Channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA.
    #[prost(int32, tag = "3")]
    pub colorspace: i32,
    /// PNG.
    #[prost(bytes = "vec", tag = "4")]
    pub encoded_image_string: Vec<u8>,
}

/// Who shows a value.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SummaryMetadata {
    /// The plugin.
    #[prost(message, optional, tag = "1")]
    pub plugin_data: Option<PluginData>,
    /// `DataClass`.
    #[prost(int32, tag = "4")]
    pub data_class: i32,
}

/// A plugin of TensorBoard.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PluginData {
    /// Its name.
    #[prost(string, tag = "1")]
    pub plugin_name: String,
    /// What it wants to know.
    #[prost(bytes = "vec", tag = "2")]
    pub content: Vec<u8>,
}

/// A tensor of texts.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Tensor {
    /// `DataType`.
    #[prost(int32, tag = "1")]
    pub dtype: i32,
    /// Shape.
    #[prost(message, optional, tag = "2")]
    pub tensor_shape: Option<TensorShape>,
    /// Its texts.
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub string_val: Vec<Vec<u8>>,
}

/// Shape of a tensor.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TensorShape {
    /// Its dimensions.
    #[prost(message, repeated, tag = "2")]
    pub dim: Vec<TensorDim>,
}

/// One dimension of a tensor.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TensorDim {
    /// Its length.
    #[prost(int64, tag = "1")]
    pub size: i64,
}
